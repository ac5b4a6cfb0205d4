"""Jobs of all methods that train together end with the weights that each ends with alone.

LoRA, DoRA, MixLoRA and MixDoRA, of different ranks, batches, lengths, learning rates and ends, with
dropout and router jitter, for 20 steps.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from loraloom.routing.tally import measure_load
from loraloom.training.step import fused as step
from tests.tiny import relative_error
from tests.training.running import matrix, trained_weights
from tests.training.toy import ADAPTERS, toy_engine

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
ORDERS = {
    "as listed": ("lora", "dora", "mixlora", "mixdora"),
    "reversed": ("mixdora", "mixlora", "dora", "lora"),
    "mixed": ("mixlora", "lora", "mixdora", "dora"),
}

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
        return measure_load(routing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "measure_load", spy)
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


def check_together(directory, alone, order, dtype, **options) -> None:
    configs, sets = matrix(gradient_checkpointing=options.pop("checkpointing", False))
    by_name = {config.name: config for config in configs}
    engine = toy_engine(directory, [by_name[name] for name in order], sets, dtype=dtype, **options)
    together = trained_weights(engine)
    for job, expected in alone[dtype].items():
        for name, weight in expected.items():
            error = relative_error(together[job][name], weight)
            assert error < TOLERANCES[dtype], f"{job} {name}"


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_weights_are_those_of_each_job_alone(tmp_path, alone, margins, order, checkpointing):
    check_together(tmp_path, alone, order, torch.float32, checkpointing=checkpointing)
    assert min(margins) > 3e-5, "too near to a tie for float32; take other seeds"


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_weights_in_float64_are_those_of_each_job_alone_to_its_rounding(tmp_path, alone, order):
    check_together(tmp_path, alone, order, torch.float64)


@pytest.mark.parametrize("limit", [66, 100, 160])
def test_weights_are_those_of_each_job_alone_whatever_fits_into_a_step(tmp_path, alone, limit):
    order = ORDERS["as listed"]
    check_together(tmp_path, alone, order, torch.float32, max_tokens_per_step=limit)


def test_the_matrix_varies_what_could_mix():
    configs, sets = matrix()
    for values in (
        [config.adapter.rank for config in configs],
        [config.train.learning_rate for config in configs],
        [config.train.micro_batch_size for config in configs],
        [config.train.max_steps for config in configs],
        [max(len(one.input_ids) for one in sets[config.name].examples) for config in configs],
    ):
        assert len(set(values)) >= 3
    assert all(config.adapter.dropout > 0 for config in configs)
    assert all(adapter.router_jitter > 0 for name, adapter in ADAPTERS.items() if "mix" in name)
