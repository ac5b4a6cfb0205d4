"""One of two ranks that do the same: every sum is twice what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from loraloom.errors import TrainingError
from loraloom.models.host import Host
from loraloom.ranks import Ranks
from loraloom.training import fitting
from loraloom.training.fitting import RoundRunner
from loraloom.training.job import Job
from loraloom.training.step import fused
from loraloom.training.step.fused import forward_backward, sum_gradients
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


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(fused, "BUCKET_BYTES", 4096)


def twin_host() -> tuple[Host, Twins]:
    host = toy_host()
    host.ranks = Twins()
    return host, host.ranks


def train_round(host: Host, jobs: list[Job]) -> None:
    outcomes = RoundRunner(host, PAD_ID).run([job.micro_batch() for job in jobs])
    assert not any(isinstance(outcome, TrainingError) for outcome in outcomes)
    for job in jobs:
        job.position.micro_step += 1


def note_first_layer(job: Job, events: list[Any]) -> None:
    """Note when the backward pass comes to the weights that it comes to last."""
    weight = next(iter(job.parameters.values()))
    weight.register_hook(lambda gradient: events.append(job.name))


@pytest.mark.parametrize("method", ADAPTERS)
def test_a_steps_gradient_is_summed_once_and_earlier_micro_batches_with_it(method):
    config = toy_config("a", ADAPTERS[method], batch_size=8, micro_batch_size=4)
    host, ranks = twin_host()
    job = add_job(host, config, random=True)
    train_round(host, [job])
    own = gradients_of(job)
    assert ranks.events == []
    for weight in job.parameters.values():
        weight.grad = None
    train_round(host, [job])
    second = {name: gradient / 2 for name, gradient in gradients_of(job).items()}
    host, _ = twin_host()
    job = add_job(host, config, random=True)
    train_round(host, [job])
    train_round(host, [job])
    assert_same(gradients_of(job), {name: 2 * (own[name] + second[name]) for name in own}, 1e-12)


def test_last_layers_of_all_jobs_travel_before_the_backward_pass_comes_to_the_first():
    host, ranks = twin_host()
    jobs = [add_job(host, toy_config(name, ADAPTERS[name]), random=True) for name in ADAPTERS]
    for job in jobs:
        note_first_layer(job, ranks.events)
    train_round(host, jobs)
    first_layer = min(ranks.events.index(job.name) for job in jobs)
    sent = sum(ranks.events[:first_layer])
    assert sent > 0.3 * sum(event for event in ranks.events if isinstance(event, int))


def test_with_a_sharded_base_gradients_travel_after_the_backward_pass():
    host, ranks = twin_host()
    ranks.in_lockstep = True
    job = add_job(host, toy_config("a"), random=True)
    note_first_layer(job, ranks.events)
    train_round(host, [job])
    assert ranks.events[0] == "a"
    assert len(ranks.events) > 2


def test_a_backward_pass_that_fails_sends_what_the_others_wait_for():
    host, ranks = twin_host()
    job = add_job(host, toy_config("a", batch_size=2, micro_batch_size=1), random=True)
    train_round(host, [job])
    before = gradients_of(job)
    batch = job.micro_batch()
    train_round(host, [job])
    expected = ranks.events.copy()
    ranks.events.clear()
    for name, weight in job.parameters.items():
        weight.grad = before[name].clone()

    def fail(_: Tensor) -> None:
        raise ValueError("injected")

    weights = list(job.parameters.values())
    weights[len(weights) // 2].register_hook(fail)
    (outcome,) = RoundRunner(host, PAD_ID).run([batch])
    assert isinstance(outcome, TrainingError)
    assert ranks.events == expected
    assert_same(gradients_of(job), before, 1e-15)


def test_a_micro_batch_in_halves_is_summed_after_both(monkeypatch):
    config = toy_config("a", batch_size=8)
    gradients = []
    for max_examples in (8, 4):

        def limited(host, batches, pad_id, bound=max_examples):
            if len(batches[0].examples) > bound:
                raise torch.OutOfMemoryError("injected")
            return forward_backward(host, batches, pad_id)

        monkeypatch.setattr(fitting, "forward_backward", limited)
        host, _ = twin_host()
        job = add_job(host, config, random=True)
        train_round(host, [job])
        gradients.append(gradients_of(job))
    assert_same(gradients[1], gradients[0], 1e-9)


def test_a_weight_without_a_gradient_anywhere_gets_none():
    host, ranks = twin_host()
    job = add_job(host, toy_config("a"), random=True)
    first, *others = job.parameters.values()
    first.grad = torch.ones_like(first)
    sum_gradients(ranks, [list(job.parameters.values())])
    assert bool((first.grad == 2).all())
    assert all(weight.grad is None for weight in others)
