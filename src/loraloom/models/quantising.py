"""Quantising a base model while it is loaded: what this machine can do, in transformers' words."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from loraloom.config.quantization import (
    AnyQuantization,
    BitsAndBytes4bit,
    BitsAndBytes8bit,
    TorchAo,
    check_fits_dtype,
)
from loraloom.errors import ConfigError, ModelError

_LIBRARIES = ("bitsandbytes", "torchao")
_INT4_CAPABILITY = (8, 0)


def check_quantization(
    quantization: AnyQuantization | None, dtype: str, device: torch.device
) -> None:
    """Find out whether a model can be quantised so here, before anything is loaded."""
    if quantization is None:
        return
    library = import_library(quantization.quant_method.partition("_")[0], "this quantization")
    check_fits_dtype(quantization, dtype)
    if isinstance(quantization, TorchAo):
        _check_torchao(quantization, device)
    elif device.type not in (known := sorted(library.supported_torch_devices)):
        raise ModelError(
            f"quantization by bitsandbytes needs a device of type {', '.join(known)}, got {device}"
        )


def check_checkpoint(
    name: str, checkpoint: Mapping[str, Any], quantization: AnyQuantization | None
) -> None:
    """Hold a checkpoint that may be quantised already against what is asked for."""
    own = checkpoint.get("quantization_config")
    if not isinstance(own, dict):
        return
    method = str(own.get("quant_method", "a library that it doesn't name"))
    if quantization is not None:
        raise ConfigError(
            f"quantization must be left out for {name}, whose weights {method} has quantised "
            "already; or name the checkpoint that they were made from"
        )
    if method in _LIBRARIES:
        import_library(method, f"the quantised checkpoint {name}")


def transformers_config(
    quantization: AnyQuantization, dtype: torch.dtype
) -> QuantizationConfigMixin:
    """Write a quantisation as transformers takes it."""
    settings = quantization.model_dump(exclude={"quant_method"})
    match quantization:
        case BitsAndBytes4bit(bnb_4bit_compute_dtype=compute_dtype):
            settings["bnb_4bit_compute_dtype"] = compute_dtype or dtype
            return BitsAndBytesConfig(load_in_4bit=True, **settings)
        case BitsAndBytes8bit():
            return BitsAndBytesConfig(load_in_8bit=True, **settings)
        case TorchAo():
            return TorchAoConfig(_torchao_type(quantization))


def import_library(name: str, purpose: str) -> ModuleType:
    """Import a quantisation library without its hints at faster kernels."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs {name}, which can't be imported ({error}); "
            "run: pip install 'loraloom[quantisation]'"
        ) from error
    finally:
        logger.setLevel(level)


def _check_torchao(quantization: TorchAo, device: torch.device) -> None:
    if quantization.quant_type == "int8_weight_only":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _INT4_CAPABILITY:
        raise ModelError(
            "quantization torchao int4_weight_only needs a CUDA device of capability 8.0 or "
            f"higher, got {device}; take torchao-int8, or nf4"
        )


def _torchao_type(quantization: TorchAo) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from torchao.quantization.granularity import PerGroup, PerRow

    size = quantization.group_size
    # torchao would change settings of torch.compile for the whole process
    if quantization.quant_type == "int8_weight_only":
        granularity = PerRow() if size is None else PerGroup(size)
        return Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    return Int4WeightOnlyConfig(
        group_size=size or 128,
        int4_packing_format="tile_packed_to_4d",  # pyright: ignore[reportArgumentType]
        set_inductor_config=False,
    )
