"""One of two ranks that do the same: every sum is twice what it was."""

from typing import Any

import torch
from torch import Tensor

from loraloom.distributed import Ranks
from loraloom.errors import TrainingError
from loraloom.host.host import Host
from loraloom.training.rounds import RoundRunner
from loraloom.training.step import fused
from loraloom.training.step.fused import add_gradients
from tests.training.step.test_fused import assert_same
from tests.training.toy import PAD_ID, add_job, forward_backward, gradients_of, toy_config, toy_host


class Twins(Ranks):
    size = 2

    def add_up(self, tensor: Tensor) -> None:
        tensor.mul_(2)

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


def twin_host() -> Host:
    host = toy_host()
    host.ranks = Twins()
    return host


def test_a_micro_batch_in_halves_is_summed_after_both(monkeypatch):
    config = toy_config("a", batch_size=8)
    gradients = []
    for max_examples in (8, 4):

        def limited(host, batches, pad_id, bound=max_examples):
            if len(batches[0].examples) > bound:
                raise torch.OutOfMemoryError("injected")
            return add_gradients(host, batches, pad_id)

        monkeypatch.setattr(fused, "add_gradients", limited)
        host = twin_host()
        job = add_job(host, config, random=True)
        (outcome,) = RoundRunner(host, PAD_ID).run([job.micro_batch()])
        assert not isinstance(outcome, TrainingError)
        gradients.append(gradients_of(job))
    assert_same(gradients[1], gradients[0], 1e-9)


def test_a_metric_that_one_rank_alone_has_is_summed_too():
    host = twin_host()
    host.ranks.gather = lambda value: [value, [["theirs"]]]
    job = add_job(host, toy_config("a"), random=True)
    job.objective = lambda scored, _: (-scored.log_probs.sum(), {"mine": torch.tensor(1.5)})
    (loss,) = forward_backward(host, [job.micro_batch()], PAD_ID)
    assert loss.metrics == {"mine": 3.0, "theirs": 0.0}
