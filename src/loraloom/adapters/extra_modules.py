"""Modules of the base model that an adapter has as its own.

A module is trained whole, as a copy (`modules_to_save`), or it has rows of its own for some tokens
(`trainable_token_indices`). Names and meaning are PEFT's. Their tensors are called

    modules.{path}.{parameter}      `modules.lm_head.weight` for instance
    tokens.{path}                   the rows of some tokens, [N, D]

Source: peft 0.21.2, `peft/utils/other.py` (`set_additional_trainable_modules`).

Axes: N tokens with rows of their own, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from loraloom.adapters.contract import AdapterConfig
from loraloom.adapters.tensor_names import Shape
from loraloom.base.blocks import BaseInfo
from loraloom.base.targets import is_meant
from loraloom.errors import AdapterError

# What the names of such tensors begin with.
MODULES, TOKENS = "modules.", "tokens."
# The settings, which are called so in all files.
OWN_FIELDS = ("modules_to_save", "trainable_token_indices")


@dataclass(frozen=True)
class OwnParts:
    """What an adapter has as its own, by the modules' paths in the base model."""

    modules: tuple[str, ...]  # trained whole
    tokens: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str]  # a head to the embedding with its rows


def refuse_own_parts(config: AdapterConfig, adapter: str, purpose: str) -> None:
    if config.modules_to_save or config.trainable_token_indices:
        raise AdapterError(
            f"{adapter} must be without modules_to_save and trainable_token_indices to {purpose}"
        )


def tensor_shapes(config: AdapterConfig, base: BaseInfo) -> dict[str, Shape]:
    """Give the name and shape of every tensor of an adapter, its method's and its own modules'."""
    parts = own_parts(config, base)
    shapes = config.tensor_shapes(base)
    for path in parts.modules:
        shapes |= {f"{MODULES}{path}.{name}": size for name, size in base.modules[path].items()}
    for path, tokens in parts.tokens.items():
        shapes[f"{TOKENS}{path}"] = (len(tokens), base.modules[path]["weight"][1])
    return shapes


def own_parts(config: AdapterConfig, base: BaseInfo) -> OwnParts:
    """Find what a configuration means in a base model."""
    modules = _modules(config, base)
    tokens = _tokens(config, base)
    tied: dict[str, str] = {}
    if base.ties_head and base.embedding in tokens:
        # As in the base, the head has the embedding's rows, unless it has tokens of its own.
        of_head = tokens.get(base.head, tokens[base.embedding])
        if of_head == tokens[base.embedding]:
            tokens.pop(base.head, None)
            tied[base.head] = base.embedding
    # A head that has the embedding's rows by being tied counts as trained for some tokens.
    both = sorted({*modules} & {*tokens, *tied})
    if both:
        raise AdapterError(
            f"a module must be trained whole or for some tokens, got {', '.join(both)} in "
            "modules_to_save and by trainable_token_indices"
        )
    return OwnParts(tuple(modules), tokens, tied)


def _modules(config: AdapterConfig, base: BaseInfo) -> list[str]:
    names = config.modules_to_save
    unknown = [name for name in names if not any(is_meant(name, path) for path in base.modules)]
    if unknown:
        last_words = dict.fromkeys(path.rpartition(".")[2] for path in base.modules)
        raise AdapterError(
            "modules_to_save must name modules outside of the base model's projections, which "
            f"target_modules adapts ({', '.join(last_words)}), got {', '.join(unknown)}"
        )
    return [path for path in base.modules if any(is_meant(name, path) for name in names)]


def _tokens(config: AdapterConfig, base: BaseInfo) -> dict[str, tuple[int, ...]]:
    indices = config.trainable_token_indices
    by_name = indices if isinstance(indices, dict) else {base.embedding: indices}
    tables = [path for path in (base.embedding, base.head) if path in base.modules]
    rows: dict[str, tuple[int, ...]] = {}
    for name, tokens in by_name.items():
        path = next((path for path in tables if is_meant(name, path)), None)
        if path is None and tokens:
            raise AdapterError(
                "trainable_token_indices must be of the base model's embedding or head "
                f"({', '.join(tables)}), got {name}"
            )
        if path is None or not tokens:
            continue
        if path in rows:
            raise AdapterError(f"trainable_token_indices must name {path} once, got {name} as well")
        if len(set(tokens)) < len(tokens):
            named = ", ".join(map(str, tokens))
            raise AdapterError(f"trainable_token_indices must name each token once, got {named}")
        num_rows = base.modules[path]["weight"][0]
        if max(tokens) >= num_rows:
            raise AdapterError(
                f"trainable_token_indices must be in [0, {num_rows}), the rows that the base model "
                f"has, got {max(tokens)}; for new tokens add rows first: "
                "model.resize_token_embeddings(len(tokenizer))"
            )
        rows[path] = tokens
    return rows
