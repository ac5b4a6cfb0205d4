"""The base model, as run files and commands ask for it."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter, Token
from pydantic import AfterValidator, Field, field_validator

from loraloom.config.fields import (
    AttnImplementation,
    BaseDtype,
    CheckInfo,
    StrictModel,
    check_device,
)
from loraloom.config.quantization import (
    AnyQuantization,
    QuantizationConfig,
    check_fits_dtype,
    parse_quantization,
)

Device = Annotated[str, AfterValidator(check_device)]


def _read_quantization(_: object, tokens: tuple[Token, ...]) -> AnyQuantization | None:
    return parse_quantization(tokens[0].value)


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

    @field_validator("quantization")
    @classmethod
    def _check_quantization(
        cls, quantization: AnyQuantization | None, info: CheckInfo
    ) -> AnyQuantization | None:
        check_fits_dtype(quantization, info.data.get("dtype"))
        return quantization

    @field_validator("attn_implementation")
    @classmethod
    def _check_attention(
        cls, implementation: AttnImplementation | None, info: CheckInfo
    ) -> AttnImplementation | None:
        wide = info.data.get("dtype") in ("float32", "float64")
        if implementation == "flash_attention_2" and wide:
            raise ValueError(
                "attn_implementation flash_attention_2 computes in 16 bits only; "
                "set dtype: bfloat16 or take sdpa"
            )
        return implementation
