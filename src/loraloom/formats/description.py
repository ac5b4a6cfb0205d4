"""What an adapter's files say about it, with no base model loaded: `loraloom inspect`."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.keys import TensorKey
from loraloom.adapters.method import AdapterConfig
from loraloom.adapters.own import MODULES, TOKENS
from loraloom.formats.contents import ADAPTER_FILES, StoredAdapter
from loraloom.formats.files import read_stored
from loraloom.formats.hub import find_adapter


@dataclass(frozen=True)
class NormDescription:
    """Frobenius norms of one kind of tensor, over all layers and experts."""

    name: str
    """`self_attn.q_proj.lora_A` or `mlp.router`, say."""
    count: int
    min: float
    median: float
    max: float


@dataclass(frozen=True)
class AdapterDescription:
    """An adapter's method, sizes and norms."""

    path: str
    layout: str
    method: str
    formula: str
    rank: int
    alpha: float | None
    scaling: float | None
    dropout: float
    rank_stabilized: bool
    target_modules: tuple[str, ...]
    experts: dict[str, Any] | None
    """The mixture's side: num_experts, top_k, routing, and the experts' rank, alpha and dropout."""
    base_model: str | None
    base_fingerprint: str | None
    prompt: dict[str, Any] | None
    """How training data wrote prompts (`PromptForm`); None if the files don't tell."""
    num_layers: int
    dtypes: tuple[str, ...]
    parameters: dict[str, int]
    """Numbers by kind: `self_attn LoRA`, `mlp experts`, `router`, `magnitudes`,
    `modules_to_save`, `tokens`."""
    num_parameters: int
    """Trained ones; what all layers share is frozen."""
    num_base_parameters: int | None
    """None if the files don't tell."""
    norms: tuple[NormDescription, ...]
    num_non_finite: int
    """Tensors with a value that is infinite or not a number; their norms are left out."""
    file_bytes: dict[str, int]

    @property
    def percent_of_base(self) -> float | None:
        """Parameters in % of the base model's; None if its size is unknown."""
        if not self.num_base_parameters:
            return None
        return 100 * self.num_parameters / self.num_base_parameters

    def to_json(self) -> dict[str, Any]:
        """Plain values, for `loraloom inspect --json`."""
        return asdict(self) | {"percent_of_base": self.percent_of_base}


def describe(path_or_hub_id: str | Path) -> AdapterDescription:
    """Describe an adapter from its files alone."""
    directory = find_adapter(path_or_hub_id)
    stored = read_stored(directory)
    keys = {name: key for name in stored.tensors if (key := TensorKey.parse(name)) is not None}
    parameters = _parameters(stored, keys)
    finite = {name for name, tensor in stored.tensors.items() if bool(tensor.isfinite().all())}
    return AdapterDescription(
        path=str(path_or_hub_id),
        layout=stored.layout,
        method=stored.config.title,
        formula=stored.config.formula,
        rank=stored.config.rank,
        dropout=stored.config.dropout,
        **stored.config.description(),
        target_modules=_used_modules(stored.config, keys),
        base_model=stored.base.name_or_path,
        base_fingerprint=stored.base.fingerprint,
        prompt=stored.base.prompt and stored.base.prompt.model_dump(exclude_none=True),
        num_layers=len({key.layer for key in keys.values()}),
        dtypes=_dtypes(stored),
        parameters=parameters,
        num_parameters=sum(parameters.values()),
        num_base_parameters=stored.base.num_parameters,
        norms=_norms({name: (keys[name], stored.tensors[name]) for name in keys if name in finite}),
        num_non_finite=len(stored.tensors) - len(finite),
        file_bytes=_file_bytes(directory),
    )


def _used_modules(config: AdapterConfig, keys: dict[str, TensorKey]) -> tuple[str, ...]:
    used = {key.projection for key in keys.values()}
    return tuple(name for name in config.target_modules if name.rpartition(".")[2] in used)


def _dtypes(stored: StoredAdapter) -> tuple[str, ...]:
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in stored.tensors.values()}
    return tuple(sorted(names))


def _parameters(stored: StoredAdapter, keys: dict[str, TensorKey]) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for name, key in keys.items():
        counts[_kind(key)] += stored.tensors[name].numel()
    for prefix, kind in ((MODULES, "modules_to_save"), (TOKENS, "tokens")):
        sizes = [t.numel() for name, t in stored.tensors.items() if name.startswith(prefix)]
        if sizes:
            counts[kind] = sum(sizes)
    return dict(counts)


def _kind(key: TensorKey) -> str:
    if key.part in ("router", "router_bias"):
        return "router"
    if key.part == "magnitude":
        return "magnitudes"
    return f"{key.block} {'LoRA' if key.expert is None else 'experts'}"


def _norms(tensors: dict[str, tuple[TensorKey, Tensor]]) -> tuple[NormDescription, ...]:
    groups: dict[str, list[float]] = defaultdict(list)
    for key, tensor in tensors.values():
        name = str(replace(key, layer=0, expert=None)).removeprefix("layers.0.")
        norm = torch.linalg.vector_norm(tensor, dtype=torch.float64).item()
        groups[name].append(norm)
    return tuple(
        NormDescription(name, len(norms), min(norms), statistics.median(norms), max(norms))
        for name, norms in groups.items()
        if math.isfinite(max(norms))
    )


def _file_bytes(directory: Path) -> dict[str, int]:
    paths = [directory / name for name in ADAPTER_FILES]
    return {path.name: path.stat().st_size for path in paths if path.exists()}
