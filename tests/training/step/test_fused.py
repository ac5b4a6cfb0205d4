import math

import pytest
from torch import Tensor

from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.host.host import Host
from loraloom.training.job import Job
from loraloom.training.step.batch import MicroBatchLoss
from tests.tiny import METHODS, relative_error
from tests.training.toy import (
    ADAPTERS,
    PAD_ID,
    add_job,
    forward_backward,
    gradients_of,
    toy_config,
    toy_host,
)


def run_window(host: Host, jobs: list[Job]) -> dict[str, MicroBatchLoss]:
    """Add the gradient of each job's whole first step, without making the step."""
    totals = {job.name: MicroBatchLoss(0.0) for job in jobs}
    waiting = list(jobs)
    while waiting:
        losses = forward_backward(host, [job.micro_batch() for job in waiting], PAD_ID)
        for job, loss in zip(waiting, losses, strict=True):
            totals[job.name] += loss
            job.position.micro_step += 1
        waiting = [j for j in waiting if j.position.micro_step < j.window.num_micro_batches]
    return totals


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert relative_error(actual[name], tensor) < tolerance, name


def without_router_loss(config: LoraConfig) -> LoraConfig:
    if isinstance(config, MixLoraConfig):
        return config.model_copy(update={"router_aux_loss_coef": 0.0})
    return config


def test_router_losses_weigh_by_the_micro_batchs_share_of_tokens():
    host = toy_host()
    adapter = METHODS["mixlora"].model_copy(update={"router_aux_loss_coef": 0.5})
    job = add_job(host, toy_config("a", adapter, batch_size=4, micro_batch_size=1), random=True)
    whole, single = 0.0, []
    for index in range(4):
        job.position.micro_step = index
        part = job.micro_batch()
        (loss,) = forward_backward(host, [part], PAD_ID)
        share = part.num_tokens / job.window.num_tokens
        single.append(loss.aux_loss / share)
        whole += loss.aux_loss
    assert min(single) < whole < max(single)
    assert all(value >= 0.5 * 2 * 0.99 for value in single)  # its minimum is coefficient × top_k


OBJECTIVES = {
    "dpo": {"name": "dpo", "beta": 0.5},
    "ipo": {"name": "dpo", "loss_type": "ipo"},
    "cpo": {"name": "cpo"},
    "hinge": {"name": "cpo", "loss_type": "hinge"},
}
CUT = [*((method, "sft") for method in ADAPTERS), *(("mixlora", name) for name in OBJECTIVES)]


@pytest.mark.parametrize(("method", "objective"), CUT)
def test_gradient_of_one_example_eight_times_is_that_of_eight_at_once(method, objective):
    rel = 1e-12 if objective == "sft" else 1e-9
    adapter = without_router_loss(ADAPTERS[method])
    results = []
    for micro_batch_size in (8, 1):
        host = toy_host()
        settings = {"objective": OBJECTIVES.get(objective, {"name": "sft"}), "batch_size": 8}
        config = toy_config("a", adapter, micro_batch_size=micro_batch_size, **settings)
        job = add_job(host, config, random=True)
        results.append((run_window(host, [job])["a"], gradients_of(job)))
    (whole, expected), (loss, gradients) = results
    assert loss.loss == pytest.approx(whole.loss, rel=rel)
    assert loss.metrics == pytest.approx(whole.metrics, rel=rel)
    assert_same(gradients, expected, 1e-6)


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_loss_that_is_not_finite_changes_no_gradient_of_other_jobs(method):
    gradients = []
    for factor in (1.0, math.inf):
        host = toy_host()
        hit = add_job(host, toy_config("hit", ADAPTERS[method]), random=True)
        well = add_job(host, toy_config("well", ADAPTERS[method]), random=True)
        # With infinity, what goes back through the rows of that job is NaN.
        hit.objective = lambda scored, _, f=factor: ((scored.log_probs * f).sum(), {})
        losses = forward_backward(host, [hit.micro_batch(), well.micro_batch()], PAD_ID)
        assert [math.isfinite(loss.loss) for loss in losses] == [factor == 1, True]
        gradients.append(gradients_of(well))
    assert_same(gradients[1], gradients[0], 1e-9)
