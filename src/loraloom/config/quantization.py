"""`quantization`: how a base model's linear layers are kept in fewer bits, and by which library.

Names are those of the libraries' own configurations.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from loraloom.config.faults import describe_faults, did_you_mean
from loraloom.config.fields import Dtype, StrictModel
from loraloom.config.yaml_text import parse_yaml
from loraloom.errors import ConfigError, shown


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


QuantizationName = Literal["nf4", "int8", "torchao-int8", "torchao-int4"]
"""What usual settings go by."""

NAMED: Mapping[str, dict[str, Any]] = {
    "nf4": {"quant_method": "bitsandbytes_4bit"},
    "int8": {"quant_method": "bitsandbytes_8bit"},
    "torchao-int8": {"quant_method": "torchao", "quant_type": "int8_weight_only"},
    "torchao-int4": {"quant_method": "torchao", "quant_type": "int4_weight_only"},
}
"""What the names stand for."""


class LoadIn4bit(BitsAndBytes4bit):
    """bitsandbytes in 4 bits, asked for as in transformers."""

    load_in_4bit: Literal[True]
    """Transformers' name for quant_method: bitsandbytes_4bit."""


class LoadIn8bit(BitsAndBytes8bit):
    """bitsandbytes in 8 bits, asked for as in transformers."""

    load_in_8bit: Literal[True]
    """Transformers' name for quant_method: bitsandbytes_8bit."""


AnyQuantization = BitsAndBytes4bit | BitsAndBytes8bit | TorchAo
_Settings = Annotated[AnyQuantization, Field(discriminator="quant_method")]


def _spelled_out(value: Any) -> Any:
    """Give a name's settings; take transformers' own flags for the method."""
    if isinstance(value, str) and value.lstrip().startswith("{"):  # as on the command line
        value = parse_yaml(value, "quantization")
    if isinstance(value, str):
        if value not in NAMED:
            raise ValueError(
                f"quantization must be {', '.join(NAMED)} or a mapping, got {shown(value)}"
                f"{did_you_mean(value, list(NAMED))}"
            )
        return NAMED[value]
    if isinstance(value, dict):
        for bits in ("4bit", "8bit"):
            if value.get(f"load_in_{bits}") is True:
                method, given = f"bitsandbytes_{bits}", value.get("quant_method")
                if given not in (None, "bitsandbytes", method):  # the second is transformers' own
                    raise ValueError(
                        f"quant_method must be {method} with load_in_{bits}: true, got "
                        f"{shown(given)}; leave one of them out"
                    )
                rest = {name: own for name, own in value.items() if name != f"load_in_{bits}"}
                return {**rest, "quant_method": method}
    return value


QuantizationConfig = Annotated[
    _Settings,
    BeforeValidator(
        _spelled_out,
        json_schema_input_type=QuantizationName | _Settings | LoadIn4bit | LoadIn8bit,
    ),
]
"""A name, or a library's settings."""


class _Section(StrictModel):
    quantization: QuantizationConfig | None = None


def parse_quantization(value: Any) -> AnyQuantization | None:
    """Check how a base model is to be quantised."""
    try:
        return _Section.model_validate({"quantization": value}).quantization
    except ValidationError as error:
        raise ConfigError("; ".join(describe_faults(error, (_Section,)))) from None


def quantization_option(quantization: AnyQuantization | None) -> str:
    """Write the option of the command line that asks for a quantisation; empty for none."""
    if quantization is None:
        return ""
    for name in NAMED:
        if parse_quantization(name) == quantization:
            return f"--quantization {name}"
    settings = quantization.model_dump(exclude_defaults=True)
    text = json.dumps({"quant_method": quantization.quant_method, **settings})
    return f"--quantization {shlex.quote(text)}"


def check_fits_dtype(quantization: AnyQuantization | None, dtype: str | None) -> None:
    """Hold a quantisation against the base model's dtype."""
    in_4_bits = isinstance(quantization, TorchAo) and quantization.quant_type == "int4_weight_only"
    if in_4_bits and dtype not in ("auto", "bfloat16", None):
        raise ConfigError(
            "quantization torchao int4_weight_only computes in bfloat16 only, got dtype "
            f"{dtype}; set dtype: bfloat16, or take nf4"
        )
