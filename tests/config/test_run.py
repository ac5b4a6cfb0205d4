import pytest
from pydantic import ValidationError

from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.training.settings import JobConfig, RunConfig

PAIRS = {"dataset": "pairs.jsonl", "format": "preference"}
DPO = {"num_epochs": 1, "objective": {"name": "dpo"}}


def job(**settings):
    defaults = {
        "name": "a",
        "adapter": {"method": "lora"},
        "data": {"task": "arc_easy"},
        "train": {"num_epochs": 1},
    }
    return {**defaults, **settings}


def run(*jobs, **settings):
    defaults = {"base_model": "smollm2-135m", "output_dir": "runs/a", "jobs": list(jobs) or [job()]}
    return RunConfig.model_validate({**defaults, **settings})


def test_the_method_decides_on_the_configuration():
    config = run(job(), job(name="b", adapter={"method": "mixlora", "num_experts": 4}))
    assert type(config.jobs[0].adapter) is LoraConfig
    assert type(config.jobs[1].adapter) is MixLoraConfig


def test_a_run_survives_being_dumped_and_read_again():
    evaluated = job(
        name="b",
        data={"mix": [{"task": "piqa", "weight": 2}], "validation": {"task": "piqa"}},
        train={"max_steps": 3, "eval_steps": 1, "max_grad_norm": None, "early_stopping": {}},
        eval=[{"task": "piqa"}],
    )
    config = run(job(), evaluated, dtype="bfloat16", trackers=["tensorboard"])
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def selection_metric(**settings):
    return JobConfig.model_validate(job(**settings)).selection_metric


def test_without_held_out_data_the_last_weights_are_kept():
    assert selection_metric() is None


def test_an_evaluation_selects_the_weights():
    assert selection_metric(eval=[{"task": "piqa"}]) == "eval/piqa/accuracy"


def test_a_task_file_is_measured_under_its_name():
    own = {"task": "tasks/quiz.yaml", "path": "data"}
    assert selection_metric(eval=[own]) == "eval/quiz/accuracy"
    assert JobConfig.model_validate(job(eval=[own])).eval[0].scoring is None
    with pytest.raises(ValidationError, match="eval must name each task once, got quiz, quiz"):
        JobConfig.model_validate(job(eval=[own, {"task": "quiz.yml"}]))


def test_an_evaluation_scores_labels_by_default():
    assert JobConfig.model_validate(job(eval=[{"task": "piqa"}])).eval[0].scoring == "label"


def test_a_test_split_never_selects_the_weights():
    on_test = [{"task": "arc_easy", "split": "test"}]
    assert selection_metric(eval=on_test) is None
    assert selection_metric(eval=[*on_test, {"task": "piqa"}]) == "eval/piqa/accuracy"
    assert selection_metric(eval=[{"task": "arc_easy", "split": "validation+test[:9]"}]) is None
    held_out = {"task": "arc_easy", "validation": {"task": "arc_easy", "split": "test"}}
    assert selection_metric(data=held_out, train={"num_epochs": 1, "eval_steps": 5}) is None


def test_the_loss_on_held_out_rows_selects_before_a_task_does():
    data = {"task": "arc_easy", "validation_fraction": 0.1}
    assert selection_metric(data=data, eval=[{"task": "piqa"}]) == "eval/loss"


def test_early_stopping_selects_by_its_metric():
    data = {"task": "arc_easy", "validation_fraction": 0.1}
    stopping = {"metric": "eval/piqa/accuracy"}
    train = {"num_epochs": 1, "eval_steps": 5, "early_stopping": stopping}
    assert selection_metric(data=data, train=train, eval=[{"task": "piqa"}]) == stopping["metric"]


RUN_FAULTS = [
    ({"device": "gpu"}, "device must be auto, cpu, cuda"),
    (
        {"attn_implementation": "flash_attention_2", "dtype": "float32"},
        "computes in 16 bits only",
    ),
    ({"trackers": ["mlflow"]}, "'jsonl', 'tensorboard', 'trackio' or 'wandb'"),
    ({"base_model": ""}, "at least 1 character"),
    ({"jobs": []}, "jobs must be a list of 1 or more, or sweep must be given"),
]


@pytest.mark.parametrize(("settings", "message"), RUN_FAULTS)
def test_a_faulty_run_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        run(**settings)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "mps"])
def test_a_device_is_named_as_torch_names_it(device):
    assert run(device=device).device == device


@pytest.mark.parametrize("name", ["a", "A"])
def test_two_jobs_of_one_name_are_refused(name):
    with pytest.raises(ValidationError, match="name must differ from those of the other jobs"):
        run(job(), job(name=name))


def test_jobs_made_in_python_are_checked_too():
    made = JobConfig.model_validate(job())
    with pytest.raises(ValidationError, match="name must differ"):
        run(made, made)


def test_an_objective_for_pairs_may_select_by_its_accuracy():
    stopping = {"metric": "eval/rewards/accuracies"}
    train = {**DPO, "eval_steps": 5, "early_stopping": stopping}
    data = {"mix": [PAIRS, {"task": "piqa"}], "validation_fraction": 0.1}
    assert selection_metric(data=data, train=train) == stopping["metric"]
    assert selection_metric(data=data, train=DPO) == "eval/loss"


def test_a_file_of_test_questions_selects_nothing():
    for name, metric in (("data/test.jsonl", None), ("data/tests.jsonl", "eval/loss")):
        rows = {"dataset": name, "format": "text"}
        assert selection_metric(data={**rows, "validation": rows}) == metric


WATCHED = {"num_epochs": 1, "eval_steps": 5}
JOB_FAULTS = [
    ({"name": "a/b"}, "name must be a safe file name"),
    ({"seed": -1}, "greater than or equal to 0"),
    ({"train": WATCHED}, "train.eval_steps has nothing to evaluate"),
    (
        {"train": {**WATCHED, "early_stopping": {"metric": "loss"}}, "eval": [{"task": "piqa"}]},
        r"must be one that the job measures outside test splits \(eval/piqa/accuracy\), got 'loss'",
    ),
    (
        {
            "train": {**WATCHED, "lr_scheduler": "greedy"},
            "eval": [{"task": "piqa", "split": "test"}],
        },
        "train.lr_scheduler greedy moves after evaluations only",
    ),
    ({"eval": [{"task": "piqa"}, {"task": "piqa", "limit": 5}]}, "eval must name each task once"),
    ({"eval": [{"task": "skills", "path": "data"}]}, "path has no effect on skills"),
    ({"data": PAIRS}, "train.objective must be dpo or cpo for data of format preference, got sft"),
    (
        {"train": DPO, "data": {"mix": [PAIRS, {"dataset": "a.jsonl", "format": "chat"}]}},
        "train.objective dpo needs pairs of answers: .* got format chat",
    ),
    (
        {"train": DPO, "data": {**PAIRS, "validation": {"dataset": "a.txt", "format": "text"}}},
        "got format text",
    ),
]


@pytest.mark.parametrize(("settings", "message"), JOB_FAULTS)
def test_a_faulty_job_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        JobConfig.model_validate(job(**settings))


@pytest.mark.parametrize(
    "adapter", [{"method": "mixlora"}, {"method": "loramoe", "balance_coef": 0}]
)
def test_groups_of_experts_need_a_method_that_has_them(adapter):
    mix = [{"task": "piqa"}, {"task": "boolq", "expert_group": 1}]
    JobConfig.model_validate(job(adapter={"method": "loramoe"}, data={"mix": mix}))
    with pytest.raises(ValidationError, match="mix has sources with an expert_group, which has no"):
        JobConfig.model_validate(job(adapter=adapter, data={"mix": mix}))
