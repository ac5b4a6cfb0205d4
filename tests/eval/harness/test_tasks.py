from __future__ import annotations

import gzip
import json
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml
from lm_eval.tasks import TaskManager

from loraloom.errors import ConfigError, DataError
from loraloom.eval.harness import load_tasks
from loraloom.eval.harness import tasks as module
from loraloom.eval.harness.tasks import check_asks_text
from tests.eval.harness.toy import ROWS, TASKS

ARC = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"}
BOOLQ = {"question": "is it", "answer": True, "passage": "It is.", "title": "It"}


@pytest.fixture(scope="module")
def all_tasks():
    """A part of lm-eval's own index, which as a whole takes many seconds to make."""
    own = Path(lm_eval.tasks.__file__).parent
    asked = [str(own / name) for name in ("arc", "super_glue")]
    return TaskManager(include_path=asked, include_defaults=False)


@pytest.fixture
def own_manager(all_tasks, monkeypatch):
    monkeypatch.setattr(module, "TaskManager", lambda **_: all_tasks)


def write_split(directory, split, rows, compressed=False):
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    name = f"{split}.jsonl.gz" if compressed else f"{split}.jsonl"
    (directory / name).write_bytes(gzip.compress(text) if compressed else text)


def test_own_tasks_need_no_index_of_lm_evals(toy_tasks, monkeypatch):
    made, manager = [], module.TaskManager
    monkeypatch.setattr(
        module, "TaskManager", lambda **options: made.append(options) or manager(**options)
    )
    tasks = load_tasks(list(TASKS), toy_tasks)
    assert [task.task_name for task in tasks] == list(TASKS)
    assert len(tasks[0].eval_docs) == len(ROWS)
    assert made == [{"include_path": str(toy_tasks), "include_defaults": False}]


def test_tasks_can_be_groups_tags_patterns_and_files(tmp_path, toy_tasks, monkeypatch):
    manager = module.TaskManager
    monkeypatch.setattr(
        module,
        "TaskManager",
        lambda include_path, include_defaults=True: manager(
            include_path=include_path, include_defaults=False
        ),
    )
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
    with pytest.raises(ConfigError, match="must ask each task once; Duplicate task 'toy_choice'"):
        load_tasks(["toy_group", "toy_choice"], tmp_path)


@pytest.mark.parametrize("mark", ["UNSAFE_CODE", "MULTIMODAL"])
def test_tasks_that_lm_eval_would_not_ask_are_refused(toy_tasks, monkeypatch, mark):
    monkeypatch.setattr("lm_eval.api.task.Task." + mark, True, raising=False)
    with pytest.raises(ConfigError, match=r"must leave out tasks that .*: toy_choice"):
        check_asks_text(load_tasks(["toy_choice"], toy_tasks))


@pytest.mark.usefixtures("own_manager")
def test_local_files_take_the_place_of_the_hubs(tmp_path):
    write_split(tmp_path / "arc_easy", "test", [ARC])
    write_split(tmp_path / "arc_easy", "train", [ARC, ARC], compressed=True)
    for data in (tmp_path, tmp_path / "arc_easy"):
        (task,) = load_tasks(["arc_easy"], data=data)
        doc = task.eval_docs[0]
        assert task.doc_to_text(doc) == "Question: Why?\nAnswer:"
        assert (task.doc_to_choice(doc), task.doc_to_target(doc)) == (["a", "b"], 1)
        assert len(task.training_docs()) == 2
        assert not task.has_validation_docs()


def test_one_tasks_data_is_not_taken_for_anothers(tmp_path, toy_tasks):
    write_split(tmp_path, "test", [ARC, ARC])
    names = ["toy_choice", "toy_letter"]
    both = load_tasks(names, toy_tasks, tmp_path)
    assert [len(task.eval_docs) for task in both] == [len(ROWS)] * 2
    (alone,) = load_tasks(names[:1], toy_tasks, tmp_path)
    assert len(alone.eval_docs) == 2


@pytest.mark.usefixtures("own_manager")
def test_boolq_reads_both_forms(tmp_path):
    super_glue = {"question": "is it", "passage": "It -- It is.", "label": 1}
    for form, row in (("own", BOOLQ), ("glue", super_glue)):
        write_split(tmp_path / form / "boolq", "validation", [row])
        (task,) = load_tasks(["boolq"], data=tmp_path / form)
        doc = task.eval_docs[0]
        assert task.doc_to_text(doc) == "It -- It is.\nQuestion: is it?\nAnswer:"
        assert task.doc_to_target(doc) == 1


@pytest.mark.usefixtures("own_manager")
def test_what_cannot_be_found_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"did you mean 'arc_easy'.*got 'arc_esay'"):
        load_tasks(["arc_esay"])
    with pytest.raises(ConfigError, match="--harness-include must be a directory"):
        load_tasks(["arc_easy"], tmp_path / "nowhere")
    write_split(tmp_path / "arc_easy", "train", [ARC])
    with pytest.raises(DataError, match="task arc_easy: its split 'test' must be among"):
        load_tasks(["arc_easy"], data=tmp_path)
    write_split(tmp_path / "arc_easy", "test", [ARC])
    (tmp_path / "arc_easy" / "validation.csv").write_text("question\n")
    with pytest.raises(DataError, match="must all be of one type"):
        load_tasks(["arc_easy"], data=tmp_path)
    with pytest.raises(DataError, match="there is no such directory of data sets"):
        load_tasks(["arc_easy"], data=tmp_path / "nowhere")


def test_data_that_cannot_be_loaded_is_an_error(tmp_path, toy_tasks):
    config = yaml.safe_load((toy_tasks / "toy_choice.yaml").read_text())
    config["dataset_kwargs"]["data_files"] = {"test": str(tmp_path / "nowhere.jsonl")}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump({**config, "task": "toy"}))
    with pytest.raises(DataError, match=r"task toy: it could not be loaded: .*nowhere\.jsonl"):
        load_tasks(["toy"], tmp_path)
