"""Hosts with the same weights on the CPU and on the pretend device, and rounds on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import loraloom
from loraloom.adapters import AdapterConfig
from loraloom.host.host import Host
from loraloom.training.settings import DpoConfig, SftConfig
from loraloom.training.step.batch import MicroBatch, Window
from loraloom.training.step.objectives import Reference, build_objective
from tests.device.pretend import on_cpu
from tests.tiny import ALL_METHODS, changed, relative_error, tiny_host, tiny_model
from tests.training.toy import PAD_ID, forward_backward, toy_examples, toy_pairs

# All methods, some of them with extra trainable modules.
CONFIGS = ALL_METHODS | {
    "dora": changed(ALL_METHODS["dora"], modules_to_save=("lm_head", "norm")),
    "mixlora": changed(
        ALL_METHODS["mixlora"], trainable_token_indices=(3, 5), modules_to_save=("lm_head",)
    ),
}


def hosts_on(
    device: torch.device,
    configs: Mapping[str, AdapterConfig] = CONFIGS,
    family: str = "llama",
    **sizes: Any,
) -> tuple[Host, Host]:
    """Attach the same adapters to the same model on the device and on the CPU."""
    on_cpu_host = tiny_host(family, configs, torch.float32, **sizes)
    host = loraloom.attach(tiny_model(family, torch.float32, **sizes).to(device))
    for name, config in configs.items():
        host.add(name, config).load_tensors(on_cpu_host.adapters[name].tensors())
    return host, on_cpu_host


def train(
    host: Host,
    names: Sequence[str],
    row_length: int | None = None,
    objective: SftConfig | DpoConfig | None = None,
) -> dict[str, Tensor]:
    """Do a round; return losses and gradients on the CPU, by name."""
    objective = objective or SftConfig()
    is_dpo = isinstance(objective, DpoConfig)
    examples = toy_pairs(2) if is_dpo else toy_examples(4)
    window = Window(0, tuple(examples), len(examples))
    batches = [
        MicroBatch(
            host.adapters[name],
            window.micro_batch(0),
            [1, 2, 3, 4],
            window,
            build_objective(objective),
            reference=Reference() if is_dpo else None,
            max_row_length=row_length,
        )
        for name in names
    ]
    losses = forward_backward(host, batches, PAD_ID)
    numbers = {"loss": torch.tensor([loss.loss + loss.aux_loss for loss in losses])}
    for name in names:
        for key, weight in host.adapters[name].named_parameters():
            if weight.grad is not None:
                numbers[f"{name}.{key}"] = on_cpu(weight.grad)
        host.adapters[name].zero_grad(set_to_none=True)
    return numbers


def assert_same(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5
) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert {name: error for name, error in errors.items() if error >= tolerance} == {}
