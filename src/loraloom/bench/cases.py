"""What benchmarks compare: the adapters of cases.yaml, in one size. Torch is not imported here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from loraloom.adapters import AdapterConfig, parse_adapter_config
from loraloom.errors import ConfigError

PEFT_CASES = ("peft-lora", "peft-lora-tuned")


@dataclass(frozen=True)
class StepSetting:
    """What a step is made of.

    Args:
        base_model: As `load_base_model` takes it.
        dtype: Of the base model.
        rows: Sequences in the batch.
        length: Tokens of each.
        rank: Of LoRA and of each expert.
        num_experts: Of a mixture.
        top_k: Of a mixture.
        num_jobs: Adapters, each with rows of its own in the batch.
        quantization: Settings of the base model's quantisation; None for none.

    Raises:
        ConfigError: If a token would use more experts than there are.
    """

    base_model: str = "smollm2-135m"
    dtype: str = "bfloat16"
    rows: int = 4
    length: int = 256
    rank: int = 8
    num_experts: int = 8
    top_k: int = 2
    num_jobs: int = 1
    quantization: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check_top_k(self.top_k, self.num_experts)


def check_top_k(top_k: int, num_experts: int) -> None:
    """Raise a ConfigError if a token would use more experts than there are."""
    if top_k > num_experts:
        raise ConfigError(f"--top-k must be at most --num-experts {num_experts}, got {top_k}")


def adapter_cases() -> tuple[str, ...]:
    """Names of our adapters."""
    return tuple(_cases()["adapters"])


def mixture_case() -> str:
    """The mixture that is measured where one has to be chosen."""
    return _cases()["mixture"]


def adapter_config(case: str, setting: StepSetting, **settings: Any) -> AdapterConfig:
    """Return the adapter of a case, with the setting's sizes where its method has such."""
    sizes = {
        "rank": setting.rank,
        "alpha": 2.0 * setting.rank,
        "num_experts": setting.num_experts,
        "top_k": setting.top_k,
    }
    own = _cases()["adapters"][case] | settings
    fields = type(parse_adapter_config(own)).model_fields
    return parse_adapter_config(own | {n: size for n, size in sizes.items() if n in fields})


@cache
def _cases() -> dict[str, Any]:
    return yaml.safe_load((files("loraloom.bench") / "cases.yaml").read_text(encoding="utf-8"))
