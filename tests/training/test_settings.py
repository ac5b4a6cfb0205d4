from typing import get_args

import pytest
import torch
from pydantic import ValidationError
from transformers.trainer_utils import SchedulerType

from loraloom.training.settings import (
    JobConfig,
    LrScheduler,
    OptimizerName,
    RunConfig,
    TrainConfig,
)

PAIRS = {"dataset": "pairs.jsonl", "format": "preference"}
DPO = {"num_epochs": 1, "objective": {"name": "dpo"}}
ON_TEST = [{"task": "arc_easy", "split": "test"}]
WATCHED = {"num_epochs": 1, "eval_steps": 5}


def job(**settings):
    defaults = {"name": "a", "adapter": {"method": "lora"}, "data": {"task": "arc_easy"}}
    return {**defaults, "train": {"num_epochs": 1}, **settings}


def run(*jobs, **settings):
    defaults = {"base_model": "smollm2-135m", "output_dir": "runs/a", "jobs": list(jobs) or [job()]}
    return RunConfig.model_validate({**defaults, **settings})


def selection_metric(**settings):
    return JobConfig.model_validate(job(**settings)).selection_metric


def test_every_optimizer_of_torch_and_every_scheduler_of_transformers_is_known():
    in_torch = {
        name.lower()
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    ours = {name for name in get_args(OptimizerName) if not name.endswith("bit")}
    assert {*ours, "lbfgs", "muon", "rprop", "sparseadam", "optimizer"} == in_torch
    names = {scheduler.value for scheduler in SchedulerType} - {"reduce_lr_on_plateau", "greedy"}
    assert set(get_args(LrScheduler)) == names


SMOOTHED = {"label_smoothing": 0.1}
CONTRADICTIONS = [
    ({"num_epochs": None}, "train must set max_steps or num_epochs, got neither"),
    ({"max_steps": 5}, "max_steps or num_epochs, not both; .* with --set jobs.0.train.num_epochs="),
    ({"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_ratio and warmup_steps exclude each other"),
    ({"lr_scheduler": "constant", "warmup_steps": 5}, "use constant_with_warmup"),
    ({"lr_scheduler": "constant", "lr_scheduler_args": {"num_cycles": 2}}, "supported by constant"),
    ({"optimizer": "muon"}, "'sgd'"),
    ({"optimizer_args": {"lr": 1}}, "must not set lr; set train's own keys"),
    ({"batch_size": 4, "micro_batch_size": 8}, "micro_batch_size must divide batch_size=4, got 8"),
    ({"early_stopping": {}}, "early_stopping requires eval_steps"),
    ({"objective": {"name": "dpo", "loss_type": "ipo"} | SMOOTHED}, "loss_type sigmoid, got ipo"),
    ({"objective": {"name": "cpo", "loss_type": "hinge"} | SMOOTHED}, "label_smoothing requires"),
]


@pytest.mark.parametrize(("settings", "message"), CONTRADICTIONS)
def test_a_setting_that_cannot_take_effect_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TrainConfig.model_validate({"num_epochs": 1, **settings})


def test_a_run_survives_being_dumped_and_read_again():
    evaluated = job(
        name="b",
        data={"mix": [{"task": "piqa", "weight": 2}], "validation": {"task": "piqa"}},
        train={**WATCHED, "early_stopping": {"patience": 2}},
        eval=[{"task": "piqa", "limit": 5}],
    )
    config = run(job(), evaluated, dtype="bfloat16", trackers=["tensorboard"])
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config


def test_held_out_rows_select_the_weights_before_a_task_and_early_stopping_before_both():
    data, evaluated = {"task": "arc_easy", "validation_fraction": 0.1}, [{"task": "piqa"}]
    assert selection_metric() is None
    assert selection_metric(eval=evaluated) == "eval/piqa/accuracy"
    assert selection_metric(data=data, eval=evaluated) == "eval/loss"
    train = {**WATCHED, "early_stopping": {"metric": "eval/piqa/accuracy"}}
    assert selection_metric(data=data, train=train, eval=evaluated) == "eval/piqa/accuracy"


def test_an_objective_for_pairs_may_select_by_its_accuracy():
    stopping = {"metric": "eval/rewards/accuracies"}
    train = {**DPO, "eval_steps": 5, "early_stopping": stopping}
    data = {"mix": [PAIRS, {"task": "piqa"}], "validation_fraction": 0.1}
    assert selection_metric(data=data, train=train) == stopping["metric"]
    assert selection_metric(data=data, train=DPO) == "eval/loss"


def test_a_test_split_never_selects_the_weights():
    assert selection_metric(eval=ON_TEST) is None
    assert selection_metric(eval=[*ON_TEST, {"task": "piqa"}]) == "eval/piqa/accuracy"
    assert selection_metric(eval=[{"task": "arc_easy", "split": "validation+test[:9]"}]) is None
    held_out = {"task": "arc_easy", "validation": {"task": "arc_easy", "split": "test"}}
    assert selection_metric(data=held_out, train=WATCHED) is None
    for name, metric in (("data/test.jsonl", None), ("data/tests.jsonl", "eval/loss")):
        rows = {"dataset": name, "format": "text"}
        assert selection_metric(data={**rows, "validation": rows}) == metric


def test_a_task_file_is_measured_under_its_name():
    own = {"task": "tasks/quiz.yaml", "path": "data"}
    assert selection_metric(eval=[own]) == "eval/quiz/accuracy"
    assert JobConfig.model_validate(job(eval=[own])).eval[0].scoring is None
    assert JobConfig.model_validate(job(eval=[{"task": "piqa"}])).eval[0].scoring == "label"
    with pytest.raises(ValidationError, match="eval must name each task once, got quiz, quiz"):
        JobConfig.model_validate(job(eval=[own, {"task": "quiz.yml"}]))


JOB_FAULTS = [
    ({"name": "a/b"}, "name must be a safe file name"),
    ({"train": WATCHED}, "train.eval_steps or eval_on_start requires data"),
    (
        {"train": {**WATCHED, "early_stopping": {"metric": "loss"}}, "eval": [{"task": "piqa"}]},
        r"must be one that the job measures outside test splits \(eval/piqa/accuracy\), got 'loss'",
    ),
    ({"data": PAIRS}, "train.objective must be dpo or cpo for data of format preference, got sft"),
    (
        {"train": DPO, "data": {"mix": [PAIRS, {"dataset": "a.jsonl", "format": "chat"}]}},
        "train.objective dpo requires pairs of answers: .* got format chat",
    ),
    ({"data": {"dataset": "a", "format": "text", "streaming": True}}, "streaming requires train"),
    ({"train": {"num_epochs": 1, "router_lr_ratio": 2}}, "requires routers, which LoRA lacks"),
]


@pytest.mark.parametrize(("settings", "message"), JOB_FAULTS)
def test_a_faulty_job_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        JobConfig.model_validate(job(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "gpu"}, "device must be auto, cpu, cuda"),
        ({"trackers": ["mflow"]}, "'mlflow', 'swanlab', 'tensorboard', 'trackio' or 'wandb'"),
        ({"jobs": [job(), job(name="A")]}, "must be unique, also in a sweep, got 'a' again"),
    ],
)
def test_a_faulty_run_is_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        run(**settings)
