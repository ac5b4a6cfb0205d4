"""The base model, as run files, Python and all commands ask for it."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from loraloom.config.fields import StrictModel
from loraloom.errors import ConfigError

Dtype = Literal["float32", "bfloat16", "float16"]
# auto: as the checkpoint has them, but bfloat16 in place of float16 where the device computes in it
BaseDtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
# by bitsandbytes (QLoRA's NF4 or FP4, with scales in 8 bits, or LLM.int8), or torchao, weights only
Quantization = Literal["nf4", "fp4", "int8", "torchao-int8"]
# All but the first two are compared with eager when a host is made.
AttnImplementation = Literal[
    "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"
]


def check_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", device):
        raise ConfigError(
            f"device must be auto, cpu, cuda, cuda:<index>, xpu, xpu:<index> or mps, got {device!r}"
        )
    return device


class BaseModelConfig(StrictModel):
    """Which base model, and how its weights are kept."""

    base_model: str = Field(min_length=1)
    """Load this base model: a Hub ID, a directory, a .gguf file or smollm2-135m."""
    dtype: BaseDtype = "auto"
    """Load the base model in this dtype. auto: the checkpoint's, or float32 for float64 and on CPUs
    slow in 16 bits. In 16 bits, rounding can change texts with the batch."""
    quantization: Quantization | None = None
    """Quantize the base model's weights to 4 or 8 bits."""
    device: Annotated[str, AfterValidator(check_device)] = "auto"
    """Run on this device: auto (an accelerator if available), cpu, cuda, cuda:0, xpu or mps."""
    attn_implementation: AttnImplementation | None = None
    """Compute attention with this implementation. Default: transformers' choice."""
