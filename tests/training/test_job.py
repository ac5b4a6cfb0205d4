from __future__ import annotations

import math

import pytest
import torch

from loraloom.adapters import MixLoraConfig
from loraloom.errors import TrainingError
from loraloom.training.job import WINDOW_STEPS, CollapseWatch
from loraloom.training.step.batch import MicroBatchLoss
from tests.training.toy import ADAPTERS, add_job, toy_config, toy_host, weights_of


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
    reports = [job.accept(job.micro_batch(), MicroBatchLoss(1.0)) for job in jobs]
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
    assert job.accept(job.micro_batch(), MicroBatchLoss(0.25, 0.5, 0.125, 1.0, {"m": 2.0})) is None
    assert all(torch.equal(p, before[name]) for name, p in job.learner.parameters.items())
    own = {"loss": 9.0, "odd": math.nan}
    report = job.accept(job.micro_batch(), MicroBatchLoss(0.5, 0.25, 0.25, 1.0, own))
    assert (report["loss"], report["aux_loss"], report["m"]) == (0.75, 0.75, 2.0)
    assert "odd" not in report
    assert report["learning_rate"] == pytest.approx(1e-2)
    assert (report["router/entropy"], report["router/load_cv"]) == (0.375, 2.0)
    assert (report["step"], job.position.micro_step) == (1, 0)
    assert report["tokens"] == job.order.window(0).num_tokens
    assert all(parameter.grad is None for parameter in job.learner.parameters.values())


def test_weights_are_proven_by_a_finite_loss():
    job = with_gradient(new_job(batch_size=4, micro_batch_size=2), 1.0)
    first = weights_of(job)
    for _ in range(2):
        job.accept(job.micro_batch(), MicroBatchLoss(1.0))
    second = weights_of(job)
    restored = new_job(batch_size=4, micro_batch_size=2)
    restored.load_state_dict(job.state_dict())
    restored.restore_proven_weights()
    assert restored.position.step == 0
    assert all(torch.equal(p, first[name]) for name, p in restored.learner.parameters.items())
    job.accept(job.micro_batch(), MicroBatchLoss(1.0))
    job.restore_proven_weights()
    assert all(torch.equal(p, second[name]) for name, p in job.learner.parameters.items())


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
    job.accept(job.micro_batch(), MicroBatchLoss(1.0))
    second = weights_of(job)
    job.take_evaluation(metrics)
    with pytest.raises(TrainingError, match="step 2: loss must be finite"):
        job.accept(job.micro_batch(), MicroBatchLoss(math.nan))
    job.restore_proven_weights()
    assert job.position.step == (1 if is_kept else 0)
    assert job.position.evaluated_step == (1 if is_kept else -1)
    kept = second if is_kept else first
    assert all(torch.equal(p, kept[name]) for name, p in job.learner.parameters.items())


CONFIG = MixLoraConfig(num_experts=4, top_k=1)
EVEN = {(0, None): [100] * 4, (3, None): [100] * 4}
COLLAPSED = {(0, None): [100] * 4, (3, None): [398, 2, 0, 0]}


def take(watch: CollapseWatch, counts, steps: int, first: int = 1) -> list[str]:
    return [w for step in range(first, first + steps) for w in watch.take(step, counts, CONFIG)]


def test_a_collapse_is_told_once_after_a_window():
    watch = CollapseWatch()
    assert take(watch, COLLAPSED, WINDOW_STEPS - 1) == []
    unused, collapsed = take(watch, COLLAPSED, 1, WINDOW_STEPS)
    assert unused.startswith(f"steps 1 to {WINDOW_STEPS}: 2 of 8 experts are almost unused")
    assert "layer 3 (experts 2, 3)" in unused
    assert "layer 3 (1.0 of 4)" in collapsed
    assert collapsed.endswith("_coef, set router_loss_scope: per_layer, or lower learning_rate")
    by_layer = CONFIG.model_copy(update={"router_loss_scope": "per_layer"})
    assert by_layer.collapse_advice == "raise router_aux_loss_coef or lower learning_rate"
    assert take(watch, COLLAPSED, 4 * WINDOW_STEPS, WINDOW_STEPS + 1) == []
    assert list(watch.warnings.values()) == [unused, collapsed]
