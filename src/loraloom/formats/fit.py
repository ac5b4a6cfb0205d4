"""Does a stored adapter fit a base model? Everything is checked here, before a weight is copied."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from loraloom.adapters.base import BaseInfo
from loraloom.adapters.keys import TensorKey
from loraloom.adapters.method import AdapterConfig
from loraloom.adapters.own import MODULES, tensor_shapes
from loraloom.errors import AdapterError, FormatError, shown
from loraloom.formats.contents import StoredAdapter, names_in
from loraloom.formats.fields import known_targets

_SAME_ACTIVATION = {
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "gelu_python": "gelu",
}
"""Names of transformers for one function; those on the right stand for both."""


def fit_to_base(stored: StoredAdapter, base: BaseInfo) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Check an adapter against a base model and give it in its final form."""
    _check_modules(stored, base)
    _check_activation(stored, base)
    config = _with_known_targets(stored, base)
    shapes = _without_lost_magnitudes(stored, _shapes(stored, config, base))
    _check_names(stored, shapes)
    check_shapes(stored.source, stored.tensors, shapes, base)
    _check_finite(stored)
    _warn_if_another_base(stored, base)
    return config, {name: _at_least_float32(stored.tensors[name]) for name in shapes}


def _shapes(
    stored: StoredAdapter, config: AdapterConfig, base: BaseInfo
) -> dict[str, tuple[int, ...]]:
    try:
        return tensor_shapes(config, base)
    except AdapterError as error:
        raise AdapterError(f"{stored.source}: {error}") from error


def check_shapes(
    source: str, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], base: BaseInfo
) -> None:
    """Raise an AdapterError for the first tensor that doesn't have the base model's shape."""
    for name, expected in shapes.items():
        if tuple(tensors[name].shape) != expected:
            advice = "use the base model that the adapter was trained on"
            if name.startswith(MODULES):
                advice += "; if tokens were added to it, resize its embeddings first"
            raise AdapterError(
                f"{source}: `{name}` must have shape {expected} on the base model "
                f"{base.name_or_path}, got {tuple(tensors[name].shape)}; {advice}"
            )


def _check_activation(stored: StoredAdapter, base: BaseInfo) -> None:
    if stored.activation is None:
        return
    canonical = [_SAME_ACTIVATION.get(name, name) for name in (stored.activation, base.activation)]
    if canonical[0] != canonical[1]:
        raise FormatError(
            f"{stored.source}: `act_fn` must be the base model's activation {base.activation!r}, "
            f"got {shown(stored.activation)}; use the base model that the adapter was trained on"
        )


def _check_modules(stored: StoredAdapter, base: BaseInfo) -> None:
    if stored.layers_path not in (None, base.layers_path):
        raise _another_base(stored, base, f"its layers are at {stored.layers_path}")
    keys = [key for key in map(TensorKey.parse, stored.tensors) if key is not None]
    paths = dict.fromkeys(key.path for key in keys)
    foreign = [
        path
        for path in paths
        if path not in (*base.shapes, f"{base.ffn}.router", f"{base.ffn}.router_bias")
    ]
    if foreign:
        raise _another_base(
            stored, base, f"it changes modules that aren't there: {names_in(foreign)}"
        )
    num_layers = 1 + max((key.layer for key in keys), default=-1)
    in_every_layer = stored.config.in_every_layer and base.attention_layers is None
    fits = num_layers == base.num_layers or (num_layers < base.num_layers and not in_every_layer)
    if keys and not fits:
        raise _another_base(stored, base, f"it has {num_layers} layers, not {base.num_layers}")


def _another_base(stored: StoredAdapter, base: BaseInfo, reason: str) -> AdapterError:
    origin = stored.base.name_or_path or "one that it doesn't name"
    return AdapterError(
        f"{stored.source} is an adapter for another base model than {base.name_or_path} "
        f"({base.model_type}): {reason}; it was made for {origin}"
    )


def _with_known_targets(stored: StoredAdapter, base: BaseInfo) -> AdapterConfig:
    names = known_targets(stored.config, base)
    if not names:
        raise FormatError(f"{stored.source}: no tensors and no `target_modules` of the base model")
    fields = stored.config.model_dump() | {"target_modules": names}
    return type(stored.config).model_validate(fields)


def _check_finite(stored: StoredAdapter) -> None:
    odd = [name for name, tensor in stored.tensors.items() if not tensor.isfinite().all()]
    if odd:
        raise FormatError(
            f"{stored.source}: weights must be finite, got infinite ones or NaN in "
            f"{names_in(odd)}; its training has diverged, take an earlier checkpoint"
        )


def _without_lost_magnitudes(
    stored: StoredAdapter, shapes: dict[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Leave magnitudes out, with a warning, where an adapter that should have some has none."""
    magnitudes = {name for name in shapes if name.endswith(".magnitude")}
    if not magnitudes or magnitudes & stored.tensors.keys():
        return shapes
    warnings.warn(
        f"{stored.source} is a DoRA without magnitudes, as MoE-PEFT, which doesn't train them "
        "either, saves it; those it had in training are taken, the norms of the base model's rows. "
        "(MoE-PEFT itself makes a LoRA of it on loading: settings={'weight_decomposition': False})",
        stacklevel=4,
    )
    return {name: shape for name, shape in shapes.items() if name not in magnitudes}


def _check_names(stored: StoredAdapter, shapes: dict[str, tuple[int, ...]]) -> None:
    missing = [name for name in shapes if name not in stored.tensors]
    unexpected = [name for name in stored.tensors if name not in shapes]
    faults = [
        f"{kind} tensors: {names_in(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if faults:
        raise FormatError(
            f"{stored.source}: {'; '.join(faults)}; every layer must have all target modules and "
            "experts that adapter_config.json names, and the adapter all modules_to_save"
        )


def _warn_if_another_base(stored: StoredAdapter, base: BaseInfo) -> None:
    """Warn of a base model of the same shapes that isn't the adapter's own.

    The files of other programs have no fingerprint, but a name: paths differ from place to place,
    so the last part alone is compared.
    """
    trained_on, here = (
        record.name_or_path or "a model without a name" for record in (stored.base, base)
    )
    consequence = "It loads, but its outputs may be wrong. Load the base model it was trained on."
    if stored.base.fingerprint is None:
        names = [Path(name).name.lower() for name in (trained_on, here)]
        if not (stored.base.name_or_path and base.name_or_path) or names[0] == names[1]:
            return
        difference = "its files don't tell whether the weights are the same"
    elif stored.base.fingerprint == base.fingerprint:
        return
    elif stored.base.quantization != base.quantization:
        kinds = (stored.base.quantization, base.quantization)
        then, now = (kind or "floating point" for kind in kinds)
        difference = f"it had weights in {then}, here they are in {now}"
        consequence = (
            "It loads. If it is the same model, outputs differ by the rounding; if not, they may "
            "be wrong."
        )
    else:
        difference = (
            f"weights differ: fingerprint {stored.base.fingerprint}, here {base.fingerprint}"
        )
    warnings.warn(
        f"{stored.source} was trained on {trained_on}, the base model here is {here} "
        f"({difference}). {consequence}",
        stacklevel=4,
    )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(torch.float32, tensor.dtype))
