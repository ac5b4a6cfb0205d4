"""Optimizers and learning rate schedules of a job."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers.optimization import GreedyLR

from loraloom.adapters.adapter import Adapter
from loraloom.config.optimization import SCHEDULERS_ON_METRIC, OptimizerName
from loraloom.config.train import TrainConfig
from loraloom.errors import ConfigError

OPTIMIZERS: dict[OptimizerName, type[Optimizer]] = {
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adamw": torch.optim.AdamW,
    "asgd": torch.optim.ASGD,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "rprop": torch.optim.Rprop,
    "sgd": torch.optim.SGD,
}
"""Optimizers by their names in a run file."""

Scheduler = LRScheduler | GreedyLR


def build_optimizer(config: TrainConfig, adapter: Adapter) -> Optimizer:
    """Make the optimizer of an adapter.

    Raises:
        ConfigError: If the optimizer does not take `optimizer_args`.
    """
    groups = parameter_groups(config, adapter)
    arguments = {"lr": config.learning_rate, **config.optimizer_args}
    if config.optimizer in ("adam", "adamw") and "foreach" not in arguments:
        arguments.setdefault("fused", True)  # an adapter has hundreds of small tensors
    try:
        return OPTIMIZERS[config.optimizer](groups, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"job {adapter.name}: optimizer {config.optimizer} can't be made with optimizer_args "
            f"{config.optimizer_args}: {error}"
        ) from error


def parameter_groups(config: TrainConfig, adapter: Adapter) -> list[dict[str, Any]]:
    """Group an adapter's weights by learning rate and weight decay.

    lora_B learns at `loraplus_lr_ratio` times the learning rate (LoRA+). lora_A, lora_B and
    routers decay. Magnitudes don't: they start at the norms of the base model's rows, and a decay
    would shrink the base model.

    Returns:
        Groups for torch.optim, the first with the job's own learning rate.

    Source:
        Hayou et al. 2024, LoRA+, arXiv:2402.12354.
    """
    ratio = config.loraplus_lr_ratio or 1.0
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in adapter.named_parameters():
        factor = ratio if name.endswith("lora_B") else 1.0
        decay = 0.0 if name.endswith("lora_magnitude_vector") else config.weight_decay
        groups.setdefault((factor, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": config.learning_rate * factor, "weight_decay": decay}
        for (factor, decay), parameters in groups.items()
    ]


def build_scheduler(
    config: TrainConfig, optimizer: Optimizer, total_steps: int, metric_mode: str, name: str
) -> Scheduler:
    """Make the schedule of a job's learning rate.

    Args:
        config: Name of the scheduler, its arguments, warm-up.
        optimizer: Whose learning rates it sets.
        total_steps: Steps of the whole job.
        metric_mode: `min` or `max`: which way the metric that selects weights gets better.
        name: Of the job, for errors.

    Raises:
        ConfigError: If the scheduler does not take `lr_scheduler_args`.
    """
    arguments = dict(config.lr_scheduler_args)
    if config.lr_scheduler in SCHEDULERS_ON_METRIC:
        arguments["mode"] = metric_mode
    try:
        return transformers.get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.warmup_steps_of(total_steps),
            num_training_steps=total_steps,
            scheduler_specific_kwargs=arguments,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"job {name}: lr_scheduler {config.lr_scheduler} can't be made with lr_scheduler_args "
            f"{config.lr_scheduler_args}: {error}"
        ) from error
