"""Base models in fewer bits: what this machine can do, and layers that a library keeps so.

Axes: I in_features, O out_features.

Layers are recognized by their libraries' classes where these are loaded already; only a model that
is to be quantized imports a library.

Source: Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339; Dettmers et al. 2023, QLoRA,
arXiv:2305.14314.
"""

import importlib
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers import BitsAndBytesConfig, TorchAoConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from loraloom.base.blocks import QuantizedWeight, is_stack
from loraloom.config.fields import did_you_mean
from loraloom.config.model import Quantization
from loraloom.errors import ConfigError, ModelError, shown


def choose_quantization(
    name: str, checkpoint: Mapping[str, Any], quantization: str | None, dtype: torch.dtype
) -> QuantizationConfigMixin | None:
    """Return how transformers is to quantize a checkpoint; None loads it as it is."""
    names = get_args(Quantization)
    if quantization is not None and quantization not in names:
        raise ConfigError(
            f"quantization must be one of {', '.join(names)}, got {shown(quantization)}"
            f"{did_you_mean(str(quantization), names)}"
        )
    earlier = checkpoint.get("quantization_config")
    if isinstance(earlier, dict):
        method = str(earlier.get("quant_method", "a library that it doesn't name"))
        if quantization is not None:
            raise ConfigError(f"{name} is already quantized by {method}; remove quantization")
        if method in ("bitsandbytes", "torchao"):
            import_library(method, f"the quantized checkpoint {name}")
    if quantization is None:
        return None
    library = "torchao" if quantization.startswith("torchao") else "bitsandbytes"
    import_library(library, "this quantization")
    if dtype == torch.float64 and quantization != "int8":
        raise ModelError(f"{quantization} does not support dtype: float64; use float32")
    match quantization:
        case "nf4" | "fp4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=quantization,
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
            )
        case "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    # torchao would change settings of torch.compile for the whole process.
    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))


def import_library(name: str, purpose: str) -> ModuleType:
    """Import a quantization library without its hints at faster kernels."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{purpose} needs {name}, which can't be imported ({error}); "
            "run: pip install 'loraloom[quantization]'"
        ) from error
    finally:
        logger.setLevel(level)


@contextmanager
def quantizing_experts() -> Iterator[None]:
    """Let transformers load stacks of experts in 4 bits too, of which it knows linear layers."""
    # both import what only a model that is to be quantized needs
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    from loraloom.base.experts_quantizer import ExpertsQuantizer

    quantizers: dict[str, Any] = AUTO_QUANTIZER_MAPPING
    before = quantizers["bitsandbytes_4bit"]
    quantizers["bitsandbytes_4bit"] = ExpertsQuantizer
    try:
        yield
    finally:
        quantizers["bitsandbytes_4bit"] = before


def warn_of_experts(name: str, model: nn.Module, quantization: str | None) -> None:
    """Warn where a quantization leaves the experts of a mixture in floating point."""
    weights = dict(model.named_parameters())
    num_left = sum(weights[path].numel() for path in weights if is_stack(model, path))
    if quantization is not None and num_left:
        num_weights = sum(weight.numel() for weight in weights.values())
        warnings.warn(
            f"quantization: {quantization} leaves the experts of {name} in floating point, "
            f"{num_left / num_weights:.0%} of all weights. Loading continues; for less "
            "memory, pass quantization: nf4.",
            stacklevel=3,
        )


def _from_4_bits(linear: Any) -> Tensor:
    # A stack that is read as an attribute of the experts is kept to the end of their forward.
    weight = linear.original if isinstance(linear, ParametrizationList) else linear.weight
    # W's rows lie one behind another, each 64 numbers have a scale.
    packed = weight.data.as_subclass(Tensor).view(torch.uint8)
    return sys.modules["bitsandbytes"].functional.dequantize_4bit(packed, _quant_state(linear))


def _quant_state(linear: Any) -> Any:
    """A 4-bit weight's scales, shape and block size."""
    if isinstance(linear, ParametrizationList):
        return linear[0].quant_state
    # Where FSDP replaces parameters, it is lost to the weight, not to the layer.
    return getattr(linear.weight, "quant_state", None) or linear.quant_state


def _from_8_bits(linear: Any) -> Tensor:
    numbers = linear.weight.data.as_subclass(Tensor)
    # A scale for each row of W; they move from the weight to the layer in the first forward.
    scales = linear.weight.SCB
    scales = linear.state.SCB if scales is None else scales
    return sys.modules["bitsandbytes"].functional.int8_vectorwise_dequant(numbers, scales)


@torch.no_grad()
def _dequantized(linear: Any) -> Tensor:
    return linear.weight.detach().dequantize()


def _probed(linear: Any) -> Tensor:
    """Read W of a format of which nothing is known: what the layer makes of unit vectors."""
    kept = [*linear.parameters(), *linear.buffers()]
    dtypes = [tensor.dtype for tensor in kept if _is_computed_with(tensor)]
    dtype = dtypes[0] if dtypes else torch.bfloat16
    units = torch.eye(linear.in_features, dtype=dtype, device=kept[0].device)
    products = type(linear).forward(linear, units)  # (I, O)
    if linear.bias is not None:
        products = products - linear.bias.to(dtype)
    return products.T


def quantized_weight(linear: nn.Module) -> QuantizedWeight | None:
    """Return how a linear layer's or a stack's weight is kept; None if in floating point."""
    if isinstance(linear, ParametrizationList):
        state = getattr(linear[0], "quant_state", None)
        kind = f"bitsandbytes {getattr(state, 'quant_type', '')}"
        return None if state is None else QuantizedWeight(linear, kind, _from_4_bits)
    weight: Any = getattr(linear, "weight", None)
    bitsandbytes = sys.modules.get("bitsandbytes")
    torchao = sys.modules.get("torchao.utils")
    if bitsandbytes is not None and isinstance(weight, bitsandbytes.nn.Params4bit):
        if weight.quant_state is None:
            return None
        return QuantizedWeight(linear, f"bitsandbytes {weight.quant_type}", _from_4_bits)
    if bitsandbytes is not None and isinstance(weight, bitsandbytes.nn.Int8Params):
        if weight.dtype != torch.int8:
            return None
        return QuantizedWeight(linear, "bitsandbytes int8", _from_8_bits)
    is_torchao = torchao is not None and isinstance(weight, torchao.TorchAOBaseTensor)
    if is_torchao and hasattr(weight, "dequantize"):
        return QuantizedWeight(linear, f"torchao {type(weight).__name__}", _dequantized)
    is_floating_point = isinstance(weight, Tensor) and _is_computed_with(weight)
    if is_floating_point and not is_torchao:
        return None
    # An unknown format; such a layer may have no weight.
    return QuantizedWeight(linear, type(getattr(linear, "weight", linear)).__name__, _probed)


def is_linear(module: nn.Module) -> bool:
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Find quantized linear layers and stacks, by the paths of their modules."""
    weights = {}
    for path, module in model.named_modules():
        has_weight = is_linear(module) or isinstance(module, ParametrizationList)
        weight = quantized_weight(module) if has_weight else None
        if weight is not None:
            weights[path] = weight
    return weights


def name_of_weight(path: str) -> str:
    """Name a checkpoint's tensor by a path of `quantized_weights`."""
    experts, is_stack, parameter = path.partition(".parametrizations.")
    return f"{experts}.{parameter}" if is_stack else f"{path}.weight"


def num_parameters(model: nn.Module, quantized: Iterable[QuantizedWeight]) -> int:
    """Count a model's weights, quantized ones as the numbers that they stand for."""
    counts = {id(parameter): parameter.numel() for parameter in model.parameters()}
    for weight in quantized:
        module = weight.linear
        if isinstance(module, ParametrizationList):
            counts[id(module.original)] = _quant_state(module).shape.numel()  # before packing
        else:
            counts[id(getattr(module, "weight", module))] = module.in_features * module.out_features
    return sum(counts.values())


def predict_weight_bytes(model: Any, quantization: str | None) -> int:
    """Predict what a model's weights take, all linear layers but the head being quantized."""
    num_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if quantization is None:
        return num_bytes
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            kept = module.weight.numel() + 4 * module.out_features  # a scale for each row
            if quantization in ("nf4", "fp4"):
                kept = _in_4_bits(module.weight)
            num_bytes += kept - module.weight.nbytes
    if quantization in ("nf4", "fp4"):
        stacks = [weight for name, weight in model.named_parameters() if is_stack(model, name)]
        num_bytes += sum(_in_4_bits(weight) - weight.nbytes for weight in stacks)
    return num_bytes


def _in_4_bits(weight: Tensor) -> int:
    return weight.numel() // 2 + weight.numel() // 64  # a scale of 8 bits for each 64 numbers


def check_computes(weights: Mapping[str, QuantizedWeight]) -> None:
    """Refuse layers that their library computes wrongly, as bitsandbytes 0.50 does some on CPUs."""
    # Its kernel there begins a block of 64 numbers with every row.
    for path, weight in weights.items():
        if weight.read is not _from_4_bits:
            continue
        scales = _quant_state(weight.linear)
        width = scales.shape[-1]
        if scales.absmax.is_cpu and width % scales.blocksize:
            raise ModelError(
                f"rows of a 4-bit weight must be a multiple of {scales.blocksize} on a CPU, where "
                f"bitsandbytes computes others wrongly, got {width} in "
                f"{name_of_weight(path).removesuffix('.weight')}; use torchao-int8, or an "
                "accelerator"
            )


def _is_computed_with(tensor: Tensor) -> bool:
    """Whether a tensor's numbers mean what they say: eight bits need a scale beside them."""
    return tensor.is_floating_point() and tensor.element_size() >= 2
