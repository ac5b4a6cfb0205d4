"""Modules of the base model that an adapter has as its own.

A module is trained whole, as a copy (`modules_to_save`), or it has rows of its own for some tokens
(`trainable_token_indices`). Names and meaning are PEFT's. Their tensors are called

    modules.{path}.{parameter}      `modules.lm_head.weight` for instance
    tokens.{path}                   the rows of some tokens, [N, D]

Source: peft 0.21.2, `peft/utils/other.py` (`set_additional_trainable_modules`).

Axes: N tokens with rows of their own, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loraloom.adapters.keys import Shape, is_meant
from loraloom.errors import AdapterError

if TYPE_CHECKING:
    from loraloom.adapters.base import BaseInfo
    from loraloom.adapters.config import AdapterConfig

MODULES, TOKENS = "modules.", "tokens."
"""What the names of such tensors begin with."""
OWN_FIELDS = ("modules_to_save", "trainable_token_indices", "ensure_weight_tying")
"""The settings, which are called so in all files."""


@dataclass(frozen=True)
class OwnParts:
    """What an adapter has as its own, by the modules' paths in the base model.

    Args:
        modules: Trained whole.
        tokens: Of an embedding or head, the tokens whose rows are trained.
        tied: From a head to the embedding whose weights are its own too.
    """

    modules: tuple[str, ...] = ()
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)


def refuse_own_parts(config: AdapterConfig, adapter: str, purpose: str) -> None:
    """Raise an AdapterError if an adapter has modules, or tokens' rows, of its own."""
    names = ("modules_to_save", "trainable_token_indices")
    own = [name for name in names if getattr(config, name)]
    if own:
        raise AdapterError(
            f"{adapter} must be without {' and '.join(names)} to {purpose}, got {', '.join(own)}"
        )


def own_parts(config: AdapterConfig, base: BaseInfo) -> OwnParts:
    """Find what a configuration means in a base model."""
    if not (config.modules_to_save or config.trainable_token_indices):
        return OwnParts()
    modules = _modules(config, base)
    tokens = _tokens(config, base)
    tied: dict[str, str] = {}
    pair = (base.embedding, base.head)
    if base.ties_head and config.ensure_weight_tying and set(pair) & set(modules):
        modules = list(dict.fromkeys([*modules, *pair]))
        tied[base.head] = base.embedding
    if base.ties_head and base.embedding in tokens:
        tied |= _tied_tokens(tokens, config, base)
    both = sorted({*modules} & {*tokens, *(tied if tokens else ())})
    if both:
        raise AdapterError(
            f"a module must be trained whole or for some tokens, got {', '.join(both)} in "
            "modules_to_save and by trainable_token_indices"
        )
    return OwnParts(tuple(modules), tokens, tied)


def own_shapes(config: AdapterConfig, base: BaseInfo) -> dict[str, Shape]:
    """Give the name and shape of each tensor of what an adapter has as its own."""
    parts = own_parts(config, base)
    whole = {
        f"{MODULES}{path}.{name}": shape
        for path in parts.modules
        for name, shape in base.modules[path].items()
    }
    rows = {
        f"{TOKENS}{path}": (len(tokens), base.modules[path]["weight"][1])
        for path, tokens in parts.tokens.items()
    }
    return whole | rows


def _modules(config: AdapterConfig, base: BaseInfo) -> list[str]:
    names = config.modules_to_save
    unknown = [name for name in names if not any(is_meant(name, path) for path in base.modules)]
    if unknown:
        known = dict.fromkeys(path.rpartition(".")[2] for path in base.modules)
        raise AdapterError(
            "modules_to_save must name modules outside of the base model's projections, which "
            f"target_modules adapts ({', '.join(known)}), got {', '.join(unknown)}"
        )
    return [path for path in base.modules if any(is_meant(name, path) for name in names)]


def _tokens(config: AdapterConfig, base: BaseInfo) -> dict[str, tuple[int, ...]]:
    given = config.trainable_token_indices
    by_name = given if isinstance(given, dict) else {base.embedding: given}
    tokens = {_table(name, base): own for name, own in by_name.items() if own}
    for path, own in tokens.items():
        _check_rows(own, base.modules[path]["weight"][0])
    return tokens


def _table(name: str, base: BaseInfo) -> str:
    tables = [path for path in (base.embedding, base.head) if path in base.modules]
    for path in tables:
        if is_meant(name, path):
            return path
    raise AdapterError(
        f"trainable_token_indices must be of the base model's embedding or head "
        f"({', '.join(tables)}), got {name}"
    )


def _check_rows(tokens: Sequence[int], num_rows: int) -> None:
    odd = [token for token in tokens if token >= num_rows]
    if odd:
        raise AdapterError(
            f"trainable_token_indices must be in [0, {num_rows}), the rows that the base model "
            f"has, got {odd[0]}; for new tokens give it more rows first: "
            "model.resize_token_embeddings(len(tokenizer))"
        )


def _tied_tokens(
    tokens: dict[str, tuple[int, ...]], config: AdapterConfig, base: BaseInfo
) -> dict[str, str]:
    """Let the head have the embedding's rows, as the base does, unless it has tokens of its own."""
    of_head = tokens.get(base.head, tokens[base.embedding])
    if of_head == tokens[base.embedding]:
        tokens.pop(base.head, None)
        return {base.head: base.embedding}
    if config.ensure_weight_tying:
        raise AdapterError(
            "trainable_token_indices must be the same for embedding and head with "
            "ensure_weight_tying, got others"
        )
    return {}
