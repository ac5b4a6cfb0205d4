"""Optimizers and learning rate schedules of a job."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from loraloom.adapters.contract import Adapter
from loraloom.adapters.lora import pattern_value
from loraloom.base.quantization import import_library
from loraloom.base.targets import matches
from loraloom.devices import has_separate_memory
from loraloom.errors import ConfigError, shown
from loraloom.training.settings import OptimizerConfig, TrainConfig


def build_optimizer(config: OptimizerConfig, adapter: Adapter) -> Optimizer:
    check_settings(config, adapter)
    return _make_optimizer(config, parameter_groups(config, adapter))


def check_settings(config: OptimizerConfig, adapter: Adapter) -> None:
    adapter.check_is_trained()
    device = next(adapter.parameters()).device
    names = [name for name, weight in adapter.named_parameters() if weight.requires_grad]
    if config.loraplus_lr_ratio and not any(name.endswith("lora_B") for name in names):
        raise ConfigError(f"{adapter.config.title} does not support loraplus_lr_ratio")
    for pattern in config.lr_ratios:
        trained = _trained_tensors(adapter)
        if not any(matches(pattern, name) for name in trained):
            raise ConfigError(
                "lr_ratios must match names of the adapter's trained tensors, "
                f"such as {[*trained][-1]}, got {shown(pattern)}"
            )
    if config.optimizer.startswith("paged_") and not has_separate_memory(device):
        raise ConfigError(
            f"optimizer {config.optimizer} requires a CUDA or XPU device, "
            f"whose memory it pages, got {device}; use "
            f"{config.optimizer.removeprefix('paged_').removesuffix('_32bit')}"
        )


def _make_optimizer(config: OptimizerConfig, groups: Sequence[dict[str, Any]]) -> Optimizer:
    library = torch.optim
    if config.optimizer.endswith("bit"):
        library = import_library("bitsandbytes", f"optimizer {config.optimizer}").optim
    members = vars(library).items()
    classes = {name.lower(): member for name, member in members if isinstance(member, type)}
    arguments = {"lr": config.learning_rate, **config.optimizer_args}
    if config.optimizer in ("adam", "adamw") and "foreach" not in arguments:
        # An adapter has hundreds of small tensors.
        arguments.setdefault("fused", True)
    if config.optimizer == "adafactor":  # torch's own, 1e-3, leaves B, which begins as 0, there
        arguments.setdefault("eps", (None, 1.0))
    with _raised_as_config_error(config, "optimizer"):
        optimizer_class = classes[config.optimizer.replace("_", "")]
        return optimizer_class(groups, **arguments)


def state_bytes(config: OptimizerConfig, weights: Sequence[Tensor]) -> int:
    """Predict the bytes of an optimizer's states on the device, from a step with another weight."""
    if config.optimizer.startswith("paged_"):  # to the machine's memory, where the device is full
        return 0
    device = "cpu" if weights[0].is_meta else weights[0].device
    weight = Parameter(torch.zeros(256, 256, device=device))
    weight.grad = torch.zeros_like(weight)
    optimizer = _make_optimizer(config, [{"params": [weight]}])
    with _raised_as_config_error(config, "optimizer"):
        optimizer.step()
    states = [state for state in optimizer.state[weight].values() if isinstance(state, Tensor)]
    bytes_per_number = sum(state.nbytes for state in states) / weight.numel()
    return round(bytes_per_number * sum(weight.numel() for weight in weights))


@contextmanager
def _raised_as_config_error(config: OptimizerConfig, setting: str) -> Iterator[None]:
    """Name the arguments that don't work: torch and transformers raise whatever comes of them."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"{setting} {getattr(config, setting)} does not accept {setting}_args "
            f"{shown(getattr(config, f'{setting}_args'))}: {type(error).__name__}: {error}"
        ) from error


def parameter_groups(config: OptimizerConfig, adapter: Adapter) -> list[dict[str, Any]]:
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in adapter.named_parameters():
        if not parameter.requires_grad:
            continue
        ratio = 1.0
        if name.endswith("lora_B"):
            ratio = config.loraplus_lr_ratio or 1.0  # Hayou et al. 2024, LoRA+, arXiv:2402.12354
        elif name.endswith(("router", "router.weight")):
            ratio = config.router_lr_ratio or 1.0
        # Magnitudes start at the norms of the base's rows: a decay would shrink the base model. Of
        # its modules that are trained whole, norms don't decay, as in transformers' Trainer.
        is_norm = name.startswith("own_modules.") and parameter.ndim == 1
        is_undecayed = is_norm or name.endswith(("lora_magnitude_vector", "bias"))
        decay = 0.0 if is_undecayed else config.weight_decay
        groups.setdefault((ratio, decay), []).append(parameter)
    rate = config.learning_rate
    return [
        {"params": parameters, "lr": rate * ratio, "lr_ratio": ratio, "weight_decay": decay}
        for (ratio, decay), parameters in groups.items()
    ]


@contextmanager
def rates_of_their_own(config: OptimizerConfig, adapter: Adapter) -> Iterator[None]:
    """Let an optimizer's step be as long as `lr_ratios` say: a step is a multiple of its rate."""
    # Experts are slices of parameters, of which an optimizer knows one rate.
    scaled = [(tensor, tensor.clone(), ratio) for tensor, ratio in _scaled_tensors(config, adapter)]
    yield
    for tensor, before, ratio in scaled:
        tensor.copy_(torch.lerp(before, tensor, ratio))


def drop_frozen_gradients(config: OptimizerConfig, adapter: Adapter) -> None:
    """Set gradients to zero that would count in the norm and move nothing."""
    parameters = {_storage(parameter): parameter for parameter in adapter.parameters()}
    for tensor in frozen_tensors(config, adapter):
        parameter = parameters[_storage(tensor)]
        if parameter.grad is not None:
            frozen = torch.zeros_like(parameter, dtype=torch.bool)
            frozen.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
            parameter.grad.masked_fill_(frozen, 0)


def frozen_tensors(config: OptimizerConfig, adapter: Adapter) -> list[Tensor]:
    return [tensor for tensor, ratio in _scaled_tensors(config, adapter) if ratio == 0]


def count_trained(config: OptimizerConfig, adapter: Adapter) -> int:
    num_frozen = sum(tensor.numel() for tensor in frozen_tensors(config, adapter))
    weights = [weight for weight in adapter.parameters() if weight.requires_grad]
    return sum(weight.numel() for weight in weights) - num_frozen


def _trained_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Those of its tensors that are parameters' parts; others are saved, as VeRA's A and B."""
    trained = {_storage(weight) for weight in adapter.parameters() if weight.requires_grad}
    tensors = adapter.tensors().items()
    return {name: tensor for name, tensor in tensors if _storage(tensor) in trained}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata  # also without data, as on the meta device


def _scaled_tensors(config: OptimizerConfig, adapter: Adapter) -> list[tuple[Tensor, float]]:
    """The tensors whose learning rate `lr_ratios` changes, with their ratios."""
    if not config.lr_ratios:
        return []
    scaled = []
    for name, tensor in _trained_tensors(adapter).items():
        ratio = pattern_value(config.lr_ratios, name, 1.0)
        if ratio != 1:
            scaled.append((tensor, ratio))
    return scaled


def copy_all(targets: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)


def build_scheduler(config: TrainConfig, optimizer: Optimizer, total_steps: int) -> LRScheduler:
    num_warmup_steps = config.warmup_steps or 0
    if config.warmup_ratio is not None:
        num_warmup_steps = math.ceil(total_steps * config.warmup_ratio)  # as transformers does
    with _raised_as_config_error(config, "lr_scheduler"):
        return transformers.get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=num_warmup_steps,
            num_training_steps=total_steps,
            scheduler_specific_kwargs=dict(config.lr_scheduler_args),
        )
