"""The base model as an adapter's files show it, where none is loaded.

Axes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from loraloom.adapters.base import BaseInfo
from loraloom.adapters.keys import TensorKey
from loraloom.adapters.own import MODULES, TOKENS
from loraloom.errors import FormatError
from loraloom.formats.contents import StoredAdapter

_FFN, _ATTENTION, _LAYERS = "mlp", "self_attn", "model.layers"
"""Names that most families have, where files don't tell."""


def seen_base(stored: StoredAdapter) -> BaseInfo:
    """Describe the base model by the names and shapes of an adapter's tensors."""
    keys = {key: stored.tensors[str(key)] for key in _keys(stored)}
    shapes = _shapes(stored)
    ffn = _ffn_block(keys)
    attention = next((key.block for key in keys if key.block != ffn), _ATTENTION)
    routers = (t.shape[-1] for key, t in keys.items() if key.projection is None)
    named = [name.rpartition(".")[2] for name in stored.config.target_modules]
    attended = tuple(sorted({key.layer for key in keys if key.block == attention}))
    num_layers = 1 + max((key.layer for key in keys), default=-1)
    order = [path for name in named for path in shapes if path.endswith(f".{name}")]
    return BaseInfo(
        name_or_path=stored.base.name_or_path or "",
        model_type=stored.base.model_type or "",
        layers_path=stored.layers_path or _LAYERS,
        attention=attention,
        ffn=ffn,
        attention_projections=_names(order, attention),
        ffn_projections=_names(order, ffn),
        activation=stored.activation or "",
        num_layers=num_layers,
        attention_layers=attended if 0 < len(attended) < num_layers else None,
        hidden_size=next(routers, 0),
        shapes=shapes,
        num_parameters=stored.base.num_parameters or 0,
        fingerprint=stored.base.fingerprint or "",
        quantization=stored.base.quantization,
        has_own_names=".language_model" not in (stored.layers_path or ""),
        **_own_modules(stored),
    )


def _keys(stored: StoredAdapter) -> list[TensorKey]:
    return [key for key in map(TensorKey.parse, stored.tensors) if key is not None]


def _shapes(stored: StoredAdapter) -> dict[str, tuple[int, int]]:
    """Tell (O, I) of each projection by B, [O, R], and A, [R, I]."""
    sizes: dict[str, dict[str, int]] = {}
    for key in _keys(stored):
        axis = {"lora_A": 1, "lora_B": 0}.get(key.part)
        tensor = stored.tensors[str(key)]
        if key.projection is not None and axis is not None and tensor.dim() == 2:
            sizes.setdefault(key.path, {}).setdefault(key.part, tensor.shape[axis])
    unknown = {key.path for key in _keys(stored) if key.projection is not None}
    unknown -= {path for path, own in sizes.items() if len(own) == 2}
    if unknown or not sizes:
        raise FormatError(
            f"{stored.source}: tensors don't tell the shapes of the base model's projections; give "
            "the base model: --base-model"
        )
    return {path: (own["lora_B"], own["lora_A"]) for path, own in sizes.items()}


def _own_modules(stored: StoredAdapter) -> dict[str, Any]:
    """Tell what is known of modules that the adapter has as its own."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in stored.tensors.items():
        if key.startswith(MODULES):
            path, _, name = key.removeprefix(MODULES).rpartition(".")
            modules.setdefault(path, {})[name] = tuple(tensor.shape)
    tables = [key.removeprefix(TOKENS) for key in stored.tensors if key.startswith(TOKENS)]
    for path in tables:
        width = stored.tensors[f"{TOKENS}{path}"].shape[-1]
        modules[path] = {"weight": (sys.maxsize, width)}
    embedding, head = [*tables, "", ""][:2]
    return {"modules": modules, "embedding": embedding, "head": head}


def _ffn_block(keys: Iterable[TensorKey]) -> str:
    """Tell the FFN block: the one with a router of its own, or else one not called attention."""
    keys = list(keys)
    others = (key.block for key in keys if "att" not in key.block)
    return next((key.block for key in keys if key.projection is None), next(others, _FFN))


def _names(paths: Iterable[str], block: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(p.partition(".")[2] for p in paths if p.startswith(f"{block}.")))
