"""Which projections a plain adapter has, and patterns that give some of them a rank of their own.

Source: peft 0.21.2, `peft/utils/other.py` (`get_pattern_key`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from loraloom.adapters.keys import is_meant
from loraloom.errors import AdapterError

if TYPE_CHECKING:
    from loraloom.adapters.base import BaseLayer
    from loraloom.adapters.lora.config import LoraConfig

_Value = TypeVar("_Value")


def projection_keys(layer: BaseLayer) -> Iterator[str]:
    """Name a layer's projections, `layers.{layer}.{block}.{projection}`."""
    for projections in layer.blocks.values():
        for projection in projections.values():
            yield projection.key


def is_pattern(pattern: str) -> bool:
    """Whether a text is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern matches the end of a module's name, at a dot or as a whole."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def pattern_value(patterns: Mapping[str, _Value], name: str, default: _Value) -> _Value:
    """Return the value of the first pattern that matches a module's name."""
    return next((value for key, value in patterns.items() if matches(key, name)), default)


def carried_over(
    patterns: Mapping[str, _Value], default: _Value, names: Mapping[str, str]
) -> dict[str, _Value]:
    """Make patterns that say of modules under new names what others say under the old ones.

    They are the same ones if these will do, without those that match nothing; else names.
    """
    used = {key: value for key, value in patterns.items() if any(matches(key, n) for n in names)}
    meant = {new: pattern_value(used, old, default) for old, new in names.items()}
    if all(pattern_value(used, new, default) == value for new, value in meant.items()):
        return used
    return {re.escape(new): value for new, value in meant.items() if value != default}


def check_selection(config: LoraConfig, base_layers: Sequence[BaseLayer]) -> None:
    """Check that all that a configuration names is in the base model."""
    keys = [key for layer in base_layers for key in projection_keys(layer)]
    if not isinstance(config.target_modules, str):
        _refuse(
            "target_modules must name projections of the base model "
            f"({', '.join(sorted({key.rpartition('.')[2] for key in keys}))}) or be all-linear, "
            "attention or ffn",
            [t for t in config.target_modules if not any(is_meant(t, key) for key in keys)],
        )
    _refuse(
        f"layers must be in [0, {len(base_layers)})",
        [str(layer) for layer in config.layers or () if layer >= len(base_layers)],
    )
    adapted = [
        key
        for layer in base_layers
        for key in projection_keys(layer)
        if key.rpartition(".")[2] in config.targets_in(layer)
    ]
    if not adapted:
        raise AdapterError("layers must have some of target_modules, got layers that have none")
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, name)
        _refuse(
            f"{name} must match adapted projections, such as {adapted[0]}",
            [key for key in patterns if not any(matches(key, place) for place in adapted)],
        )


def _refuse(rule: str, odd: Sequence[str]) -> None:
    if odd:
        raise AdapterError(f"{rule}; got {', '.join(sorted(odd))}")
