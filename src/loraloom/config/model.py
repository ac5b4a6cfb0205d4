"""The base model, as run files, Python and all commands ask for it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token
from pydantic import AfterValidator, BeforeValidator, Field
from typing_extensions import override

from loraloom.config.fields import StrictModel, checked, did_you_mean
from loraloom.config.text import parse_yaml
from loraloom.errors import ConfigError, shown

# Number format of the base model's weights and of the low-rank products.
Dtype = Literal["float32", "bfloat16", "float16"]

# Number format of the base model's weights as it is asked for; auto: as the checkpoint has them,
# but bfloat16 in place of float16 where the device computes in it.
BaseDtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]

# How transformers computes attention.
AttnImplementation = Literal["sdpa", "eager", "flash_attention_2"]


_WIDE = ("float32", "float64")


def check_device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", device):
        raise ConfigError(
            f"device must be auto, cpu, cuda, cuda:<index>, xpu, xpu:<index> or mps, got {device!r}"
        )
    return device


Device = Annotated[str, AfterValidator(check_device)]


class BitsAndBytes4bit(StrictModel):
    """bitsandbytes in 4 bits, as in QLoRA.

    Source: Dettmers et al. 2023, QLoRA, arXiv:2305.14314.
    """

    quant_method: Literal["bitsandbytes_4bit"] = "bitsandbytes_4bit"
    """bitsandbytes in 4 bits."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 16 numbers that a weight may be: quantiles of a normal distribution, or floats."""
    bnb_4bit_use_double_quant: bool = True
    """Whether the scales of 64 weights each are quantised too, to 8 bits."""
    bnb_4bit_compute_dtype: Dtype | None = None
    """Number format of the products; null for the base model's dtype."""
    bnb_4bit_quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] = "uint8"
    """Type of the tensors that hold the bits: what shards a model may want its dtype."""


class BitsAndBytes8bit(StrictModel):
    """bitsandbytes' LLM.int8: products of 8-bit integers, large inputs apart in float16.

    Source: Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339.
    """

    quant_method: Literal["bitsandbytes_8bit"] = "bitsandbytes_8bit"
    """bitsandbytes in 8 bits."""
    llm_int8_threshold: float = Field(default=6.0, ge=0)
    """Input columns with a larger number are multiplied in float16; 0: none are."""


class TorchAo(StrictModel):
    """torchao, weights only: they become floating-point numbers in front of each product."""

    quant_method: Literal["torchao"] = "torchao"
    """torchao."""
    quant_type: Literal["int8_weight_only", "int4_weight_only"] = "int8_weight_only"
    """Bits of a weight. Four need a CUDA device of capability 8.0, and dtype bfloat16."""
    group_size: Literal[32, 64, 128, 256] | None = None
    """Weights of a row that share a scale; null for whole rows in 8 bits, 128 in 4 bits."""


AnyQuantization = BitsAndBytes4bit | BitsAndBytes8bit | TorchAo

# What usual settings go by.
_NAMED: dict[str, AnyQuantization] = {
    "nf4": BitsAndBytes4bit(),
    "int8": BitsAndBytes8bit(),
    "torchao-int8": TorchAo(),
    "torchao-int4": TorchAo(quant_type="int4_weight_only"),
}


def _spelled_out(value: Any) -> Any:
    # on the command line, a mapping is a text
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parse_yaml(value, "quantization")
    if isinstance(value, str):
        if value not in _NAMED:
            raise ValueError(
                f"quantization must be {', '.join(_NAMED)} or a mapping, got {shown(value)}"
                f"{did_you_mean(value, _NAMED)}"
            )
        return _NAMED[value]
    # transformers' own flags stand for the method, whose name it spells without the bits
    if isinstance(value, dict) and value.get("quant_method") in (None, "bitsandbytes"):
        for bits in ("4bit", "8bit"):
            if value.get(f"load_in_{bits}") is True:
                rest = {name: one for name, one in value.items() if name != f"load_in_{bits}"}
                return {**rest, "quant_method": f"bitsandbytes_{bits}"}
    return value


def _read_quantization(_: object, tokens: tuple[Token, ...]) -> str:
    return tokens[0].value


# A name, or a library's settings.
QuantizationConfig = Annotated[
    Annotated[AnyQuantization, Field(discriminator="quant_method")],
    BeforeValidator(
        _spelled_out,
        json_schema_input_type=Literal["nf4", "int8", "torchao-int8", "torchao-int4"]
        | dict[str, Any],
    ),
]


class _Section(StrictModel):
    quantization: QuantizationConfig | None = None


def parse_quantization(value: Any) -> AnyQuantization | None:
    """Check how a base model is to be quantised."""
    return checked(_Section, {"quantization": value}).quantization


def check_fits_dtype(quantization: AnyQuantization | None, dtype: str | None) -> None:
    """Hold a quantisation against the base model's dtype."""
    in_4_bits = isinstance(quantization, TorchAo) and quantization.quant_type == "int4_weight_only"
    if in_4_bits and dtype not in ("auto", "bfloat16", None):
        raise ConfigError(
            "quantization torchao int4_weight_only computes in bfloat16 only, got dtype "
            f"{dtype}; set dtype: bfloat16, or take nf4"
        )


class BaseModelConfig(StrictModel):
    """Which base model, and how its weights are kept."""

    base_model: str = Field(min_length=1)
    """Hub id, directory or .gguf file of a causal language model, or smollm2-135m."""
    dtype: BaseDtype = "auto"
    """Number format of the base model; auto: its checkpoint's, but float32 on a CPU that multiplies
    16 bits slowly. Adapters are kept in float32."""
    quantization: Annotated[
        QuantizationConfig | None,
        Parameter(converter=_read_quantization, accepts_keys=False, n_tokens=1),
    ] = None
    """nf4, int8, torchao-int8, torchao-int4, or a library's settings, {load_in_4bit: true, ...} for
    example; null: none."""
    device: Device = "auto"
    """auto (an accelerator where there is one), cpu, cuda, cuda:0, xpu, mps."""
    attn_implementation: AttnImplementation | None = None
    """How transformers computes attention; null for its own choice."""

    @override
    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        check_fits_dtype(self.quantization, self.dtype)
        if self.attn_implementation == "flash_attention_2" and self.dtype in _WIDE:
            yield (
                "attn_implementation flash_attention_2 computes in 16 bits only; "
                "set dtype: bfloat16 or take sdpa"
            )
