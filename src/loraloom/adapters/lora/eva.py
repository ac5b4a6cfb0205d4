"""Initial weights of a LoRA from the activations of its training data, as PEFT computes them.

A's rows are the main directions of a projection's inputs; ranks move to projections whose inputs
vary in more directions. B starts at zero.

Axes: B rows, L tokens, R rank, I in_features.

Source: Paischer et al. 2024, EVA, arXiv:2410.07170; peft 0.21.2, `peft/tuners/lora/eva.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loraloom.adapters.lora.config import LoraConfig
from loraloom.adapters.lora.start import import_peft
from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from loraloom.adapters.base import BaseInfo

_MOST_FORWARDS = 500
"""Beside those of all batches; directions that don't settle are an error then."""


def eva_start(
    config: LoraConfig, model: Any, batches: Sequence[Mapping[str, Tensor]], base: BaseInfo
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Look at batches; see `AdapterConfig.started`."""
    import_peft(config.init)
    from peft.tuners.lora.eva import get_eva_state_dict

    keys = [
        f"layers.{key.layer}.{key.path}"
        for layer in range(base.num_layers)
        for key, _ in config.layer_shapes(base, layer)
        if key.part == "lora_A"
    ]
    names = {f"{base.layers_path}{key.removeprefix('layers')}": key for key in keys}
    theirs = _peft_config(config, names)
    _check_enough(config, batches, keys, theirs.eva_config.label_mask_value)
    with torch.random.fork_rng(devices=[]), _without_hooks_left(model):
        found = get_eva_state_dict(
            model,
            list(batches),  # pyright: ignore[reportArgumentType]
            theirs,
            forward_fn=_counted(len(batches) + _MOST_FORWARDS),
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    directions = {names[name]: lora_A for name, lora_A in found.items() if len(lora_A)}
    started = _with_ranks(config, {key: len(lora_A) for key, lora_A in directions.items()}, keys)
    return started, {f"{key}.lora_A": lora_A for key, lora_A in directions.items()}


@contextmanager
def _without_hooks_left(model: Any) -> Iterator[None]:
    """Take off at an error what PEFT would leave on the base model."""
    hooks = {module: set(module._forward_hooks) for module in model.modules()}
    try:
        yield
    finally:
        for module, before in hooks.items():
            for key in module._forward_hooks.keys() - before:
                del module._forward_hooks[key]


def _peft_config(config: LoraConfig, names: Mapping[str, str]) -> Any:
    from peft import EvaConfig
    from peft import LoraConfig as PeftConfig

    return PeftConfig(
        r=config.rank,
        target_modules=list(names),
        init_lora_weights="eva",
        eva_config=EvaConfig(**config.eva.model_dump()),
        rank_pattern={re.escape(name): config.at(key).rank for name, key in names.items()},
    )


def _with_ranks(config: LoraConfig, ranks: Mapping[str, int], keys: Sequence[str]) -> LoraConfig:
    """Give settings that say the ranks that were found; a projection of rank 0 is left out."""
    alphas = {key: config.at(key).alpha for key in ranks}
    if config.eva.adjust_scaling_factors:
        alphas = {key: a * ranks[key] / config.at(key).rank for key, a in alphas.items()}
    changes: dict[str, Any] = {
        "eva": {},
        "init": "kaiming",  # what is saved and loaded again knows nothing of its start
        "rank_pattern": {re.escape(k): rank for k, rank in ranks.items() if rank != config.rank},
        "alpha_pattern": {re.escape(k): a for k, a in alphas.items() if a != config.alpha},
    }
    if len(ranks) < len(keys):
        changes |= {"target_modules": tuple(ranks), "layers": None}
    return LoraConfig.model_validate(config.model_dump() | changes)


def _check_enough(
    config: LoraConfig,
    batches: Sequence[Mapping[str, Tensor]],
    keys: Sequence[str],
    no_label: int,
) -> None:
    """Raise a ConfigError where PEFT would wait for more tokens for ever."""
    wanted = round(config.eva.rho * max(config.at(key).rank for key in keys))
    column = "labels" if config.eva.use_label_mask else "attention_mask"
    nothing = no_label if config.eva.use_label_mask else 0
    counts = [int((batch[column] != nothing).sum()) for batch in batches]
    if min(counts, default=0) < wanted:
        raise ConfigError(
            f"init: eva needs batches with eva.rho × rank = {wanted} tokens to look at, got "
            f"{min(counts, default=0)}; give more data, a lower rank, or eva.use_label_mask: false"
        )


def _counted(most: int) -> Callable[[Any, Mapping[str, Tensor]], None]:
    """Run a batch through a model, up to `most` times."""
    left = iter(range(most))

    def forward(model: Any, inputs: Mapping[str, Tensor]) -> None:
        if next(left, None) is None:
            raise ConfigError(
                f"init: eva needs directions that settle, they still move after {most} batches; "
                "lower eva.tau or rank, or give more data"
            )
        model.base_model(  # no logits, which would be the largest tensor by far
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        )

    return forward
