"""One of two ranks that do the same: every sum is twice what it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loraloom.distributed import Ranks
from loraloom.errors import TrainingError
from loraloom.host.host import Host
from loraloom.training import rounds
from loraloom.training.job import Job
from loraloom.training.rounds import RoundRunner
from loraloom.training.step.fused import forward_backward
from loraloom.training.step.objectives import ObjectiveTerms
from tests.training.step.test_fused import assert_same
from tests.training.toy import ADAPTERS, PAD_ID, add_job, gradients_of, toy_config, toy_host


class Twins(Ranks):
    """Keeps the sizes of what is sent of weights, and what else happens."""

    size = 2

    def __init__(self):
        super().__init__()
        self.events: list[Any] = []

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Double it when it is waited for."""
        if tensor.numel() > 100:
            self.events.append(tensor.numel())

        def wait() -> None:
            tensor.mul_(2)

        return wait

    def gather(self, value: Any) -> list[Any]:
        """Return the value twice."""
        return [value, value]


def twin_host() -> tuple[Host, Twins]:
    host = toy_host()
    host.ranks = Twins()
    return host, host.ranks


def train_round(host: Host, jobs: list[Job]) -> None:
    outcomes = RoundRunner(host, PAD_ID).run([job.micro_batch() for job in jobs])
    assert not any(isinstance(outcome, TrainingError) for outcome in outcomes)
    for job in jobs:
        job.position.micro_step += 1


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_steps_gradient_is_summed_once_and_earlier_micro_batches_with_it(method):
    config = toy_config("a", ADAPTERS[method], batch_size=8, micro_batch_size=4)
    host, ranks = twin_host()
    job = add_job(host, config, random=True)
    train_round(host, [job])
    own = gradients_of(job)
    assert ranks.events == []
    for weight in job.learner.parameters.values():
        weight.grad = None
    train_round(host, [job])
    second = {name: gradient / 2 for name, gradient in gradients_of(job).items()}
    host, _ = twin_host()
    job = add_job(host, config, random=True)
    train_round(host, [job])
    train_round(host, [job])
    assert_same(gradients_of(job), {name: 2 * (own[name] + second[name]) for name in own}, 1e-12)


def test_a_micro_batch_in_halves_is_summed_after_both(monkeypatch):
    config = toy_config("a", batch_size=8)
    gradients = []
    for max_examples in (8, 4):

        def limited(host, batches, pad_id, bound=max_examples):
            if len(batches[0].examples) > bound:
                raise torch.OutOfMemoryError("injected")
            return forward_backward(host, batches, pad_id)

        monkeypatch.setattr(rounds, "forward_backward", limited)
        host, _ = twin_host()
        job = add_job(host, config, random=True)
        train_round(host, [job])
        gradients.append(gradients_of(job))
    assert_same(gradients[1], gradients[0], 1e-9)


def test_a_metric_that_one_rank_alone_has_is_summed_too():
    host, ranks = twin_host()
    ranks.gather = lambda value: [value, [["theirs"]]]
    job = add_job(host, toy_config("a"), random=True)
    job.objective = lambda scored, _: ObjectiveTerms(-scored.log_probs.sum(), {"mine": 1.5})
    (loss,) = forward_backward(host, [job.micro_batch()], PAD_ID)
    assert loss.metrics == {"mine": 3.0, "theirs": 0.0}
