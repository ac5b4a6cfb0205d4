import pytest
import yaml

from loraloom.errors import ConfigError, DataError
from loraloom.eval.harness import load_tasks
from loraloom.eval.harness import tasks as module


@pytest.fixture
def alone(toy_tasks, monkeypatch):
    """Leave lm-eval's own tasks out, whose index takes seconds."""
    manager = module.TaskManager

    def index(include_path=str(toy_tasks), **_):
        return manager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(module, "TaskManager", index)


@pytest.mark.usefixtures("alone")
def test_tasks_can_be_groups_tags_patterns_and_files(tmp_path, toy_tasks):
    both = ["toy_choice", "toy_letter"]
    for name in both:
        config = yaml.safe_load((toy_tasks / f"{name}.yaml").read_text())
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**config, "tag": "toys"}))
    group = {"group": "toy_group", "task": both, "aggregate_metric_list": [{"metric": "acc"}]}
    (tmp_path / "group.yaml").write_text(yaml.safe_dump(group))
    assert [task.task_name for task in load_tasks(["toys"], tmp_path)] == both
    assert [task.task_name for task in load_tasks(["toy_c*", "toy_l*"], tmp_path)] == both
    (group,) = load_tasks(["toy_group"], tmp_path)
    assert sorted(task.task_name for task in group.get_all_tasks()) == both
    (task,) = load_tasks([str(toy_tasks / "toy_blank.yaml")], tmp_path)
    assert task.task_name == "toy_blank"
    with pytest.raises(ConfigError, match="must name each task once; Duplicate task 'toy_choice'"):
        load_tasks(["toy_group", "toy_choice"], tmp_path)


@pytest.mark.usefixtures("alone")
def test_what_cannot_be_found_is_an_error(toy_tasks):
    with pytest.raises(ConfigError, match=r"did you mean 'toy_choice'.*got 'toy_chioce'"):
        load_tasks(["toy_chioce"])
    with pytest.raises(ConfigError, match="--harness-include must be a directory"):
        load_tasks(["toy_choice"], toy_tasks / "nowhere")


def test_data_that_cannot_be_loaded_is_an_error(tmp_path, toy_tasks):
    config = yaml.safe_load((toy_tasks / "toy_choice.yaml").read_text())
    config["dataset_kwargs"]["data_files"] = {"test": str(tmp_path / "nowhere.jsonl")}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**config, "task": "toy"}))
    with pytest.raises(DataError, match=r"task toy could not be loaded: .*nowhere\.jsonl"):
        load_tasks(["toy"], tmp_path)
