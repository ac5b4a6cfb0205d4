import math

import pytest
import torch

from loraloom.errors import TrainingError
from loraloom.training.step.batch import MicroBatchLoss
from tests.training.toy import ADAPTERS, accept, add_job, toy_config, toy_host, weights_of


def with_gradient(job, value: float):
    for parameter in job.learner.parameters.values():
        parameter.grad = torch.full_like(parameter, value)
    return job


def new_job(**settings):
    return add_job(toy_host(), toy_config("a", ADAPTERS["mixlora"], **settings))


def test_gradient_is_clipped_over_the_adapters_weights_alone():
    host = toy_host()
    jobs = [
        with_gradient(add_job(host, toy_config(name, optimizer="sgd", max_grad_norm=0.5)), value)
        for name, value in (("loud", 10.0), ("quiet", 1e-6))
    ]
    before = [weights_of(job) for job in jobs]
    reports = [accept(job, MicroBatchLoss(1.0)) for job in jobs]
    moves = [
        torch.stack(
            [(old[name] - p.detach()).norm() for name, p in job.learner.parameters.items()]
        ).norm()
        for job, old in zip(jobs, before, strict=True)
    ]
    assert float(moves[0]) == pytest.approx(0.5 * 1e-2, rel=1e-4)
    assert reports[0]["grad_norm"] > 0.5 > reports[1]["grad_norm"]
    assert float(moves[1]) == pytest.approx(reports[1]["grad_norm"] * 1e-2, rel=1e-4)


def test_a_step_is_made_after_the_last_micro_batch():
    job = with_gradient(new_job(batch_size=4, micro_batch_size=2, loraplus_lr_ratio=4.0), 1.0)
    job.learner.optimizer.param_groups.reverse()  # B first, as where A is frozen
    before = weights_of(job)
    assert accept(job, MicroBatchLoss(0.25, 0.5, 0.125, 1.0, {"m": 2.0})) is None
    assert all(torch.equal(p, before[name]) for name, p in job.learner.parameters.items())
    own = {"loss": 9.0, "odd": math.nan}
    report = accept(job, MicroBatchLoss(0.5, 0.25, 0.25, 1.0, own))
    assert (report["loss"], report["aux_loss"], report["m"]) == (0.75, 0.75, 2.0)
    assert "odd" not in report
    assert report["learning_rate"] == pytest.approx(1e-2)
    assert (report["router/entropy"], report["router/load_cv"]) == (0.375, 2.0)
    assert (report["step"], job.position.micro_step) == (1, 0)
    assert report["tokens"] == job.order.window(0).num_tokens
    assert all(parameter.grad is None for parameter in job.learner.parameters.values())


@pytest.mark.parametrize(
    ("metrics", "is_kept"),
    [
        ({"eval/loss": 1.5}, True),
        ({"eval/a/accuracy": 0.5}, True),
        ({"eval/a/accuracy": 0.0}, False),  # as if all scores were NaN
        ({}, False),
    ],
)
def test_weights_are_proven_by_an_evaluation(metrics, is_kept):
    job = with_gradient(new_job(batch_size=4), 1.0)
    first = weights_of(job)
    accept(job, MicroBatchLoss(1.0))
    second = weights_of(job)
    job.take_evaluation(metrics)
    with pytest.raises(TrainingError, match="step 2: loss must be finite"):
        accept(job, MicroBatchLoss(math.nan))
    job.restore_proven_weights()
    assert job.position.step == (1 if is_kept else 0)
    assert job.position.evaluated_step == (1 if is_kept else -1)
    kept = second if is_kept else first
    assert all(torch.equal(p, kept[name]) for name, p in job.learner.parameters.items())
