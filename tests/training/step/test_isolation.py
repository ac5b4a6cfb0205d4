"""Jobs of all methods that train together end with the weights that each ends with alone.

LoRA, DoRA, MixLoRA and MixDoRA, of different ranks, batches, lengths, learning rates and ends, with
dropout and router jitter, for 12 steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loraloom.routing.tally import measure_routing
from loraloom.training.step import fused as step
from tests.tiny import relative_error
from tests.training.running import matrix, trained_weights
from tests.training.toy import toy_engine

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}

Weights = dict[str, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def margins() -> Iterator[list[float]]:
    """Collect how far each step's routing is from choosing another expert."""
    found: list[float] = []

    def spy(routing):
        for layer in routing:
            logits = layer.router_logits.detach().sort(-1, descending=True).values
            top_k = layer.selected_experts.shape[1]
            found.append(float((logits[:, top_k - 1] - logits[:, top_k]).min()))
        return measure_routing(routing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "measure_routing", spy)
        yield found


@pytest.fixture(scope="module")
def alone(tmp_path_factory, margins) -> dict[torch.dtype, Weights]:
    """Each job's weights when nothing trains beside it."""
    weights: dict[torch.dtype, Weights] = {}
    for dtype in TOLERANCES:
        configs, sets = matrix()
        weights[dtype] = {}
        for config in configs:
            directory = tmp_path_factory.mktemp(config.name)
            weights[dtype] |= trained_weights(toy_engine(directory, [config], sets, dtype=dtype))
    return weights


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float64, {}),
        (torch.float32, {}),
        (torch.float32, {"checkpointing": True}),
        (torch.float32, {"max_tokens_per_step": 66}),
    ],
    ids=str,
)
def test_weights_are_those_of_each_job_alone(tmp_path, alone, margins, dtype, options):
    configs, sets = matrix(gradient_checkpointing=options.get("checkpointing", False))
    options = {name: value for name, value in options.items() if name != "checkpointing"}
    together = trained_weights(toy_engine(tmp_path, configs[::-1], sets, dtype=dtype, **options))
    for job, expected in alone[dtype].items():
        for name, weight in expected.items():
            assert relative_error(together[job][name], weight) < TOLERANCES[dtype], f"{job} {name}"
    assert min(margins) > 3e-5, "too near to a tie for float32; take other seeds"
