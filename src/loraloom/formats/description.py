"""What an adapter's files say about it, with no base model loaded: `loraloom inspect`."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from loraloom.adapters.keys import TensorKey
from loraloom.adapters.own import MODULES, TOKENS
from loraloom.formats.disk import ADAPTER_FILES
from loraloom.formats.files import read_stored
from loraloom.formats.hub import find_adapter

# What parts are counted as, where they aren't a LoRA's or an expert's.
_KINDS = {"router": "router", "magnitude": "magnitudes"}


@dataclass(frozen=True)
class AdapterDescription:
    """An adapter's method, sizes and norms."""

    path: str
    layout: str
    method: str
    formula: str
    settings: dict[str, Any]
    """The method's, as in a run file; those that are unset are left out."""
    target_modules: tuple[str, ...]
    """Those with tensors."""
    base_model: str | None
    base_fingerprint: str | None
    prompt: dict[str, Any] | None
    """How training data wrote prompts (`PromptForm`); None if the files don't tell."""
    num_layers: int
    dtypes: tuple[str, ...]
    parameters: dict[str, int]
    """By kind: `self_attn LoRA`, `mlp experts`, `router`, `magnitudes`, `modules_to_save`,
    `tokens`."""
    num_parameters: int
    """Trained ones; what all layers share is frozen."""
    num_base_parameters: int | None
    norms: dict[str, dict[str, Any]]
    """Count, min, median and max of the Frobenius norms of a kind of tensor, over all layers and
    experts: of `self_attn.q_proj.lora_A` or `mlp.router`, say."""
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
        return asdict(self) | {"percent_of_base": self.percent_of_base}


def describe(path_or_hub_id: str | Path) -> AdapterDescription:
    directory = find_adapter(path_or_hub_id)
    stored = read_stored(directory)
    config, tensors = stored.config, stored.tensors
    keys = {name: key for name in tensors if (key := TensorKey.parse(name)) is not None}
    non_finite = {name for name, tensor in tensors.items() if not tensor.isfinite().all()}
    parameters: dict[str, int] = defaultdict(int)
    norms: dict[str, list[float]] = defaultdict(list)
    for name, key in keys.items():
        own = f"{key.block} {'LoRA' if key.expert is None else 'experts'}"
        parameters[_KINDS.get(key.part, own)] += tensors[name].numel()
        norm = torch.linalg.vector_norm(tensors[name], dtype=torch.float64).item()
        if name not in non_finite:
            norms[str(replace(key, layer=0, expert=None)).removeprefix("layers.0.")].append(norm)
    for name, tensor in tensors.items():
        for prefix, kind in ((MODULES, "modules_to_save"), (TOKENS, "tokens")):
            if name.startswith(prefix):
                parameters[kind] += tensor.numel()
    used = {key.projection for key in keys.values()}
    files = [directory / name for name in ADAPTER_FILES]
    return AdapterDescription(
        path=str(path_or_hub_id),
        layout=stored.layout,
        method=config.title,
        formula=config.formula,
        settings=config.model_dump(mode="json", exclude_none=True, exclude={"target_modules"}),
        target_modules=tuple(t for t in config.target_modules if t.rpartition(".")[2] in used),
        base_model=stored.base.name_or_path,
        base_fingerprint=stored.base.fingerprint,
        prompt=stored.prompt and stored.prompt.model_dump(exclude_none=True),
        num_layers=len({key.layer for key in keys.values()}),
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})),
        parameters=dict(parameters),
        num_parameters=sum(parameters.values()),
        num_base_parameters=stored.base.num_parameters,
        norms={
            name: {"count": len(own), "min": min(own), "median": median(own), "max": max(own)}
            for name, own in norms.items()
            if math.isfinite(max(own))  # finite values may have an infinite norm
        },
        num_non_finite=len(non_finite),
        file_bytes={path.name: path.stat().st_size for path in files if path.exists()},
    )
