"""The raw files of an adapter, and what all layouts on disk read from them alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    StringConstraints,
)

from loraloom.config.data import PromptForm
from loraloom.config.fields import checked
from loraloom.errors import FormatError, plain, shown

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "adapter_config.json"
LORA_FIELDS = {
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "rank_stabilized": "use_rslora",
    "weight_decomposition": "use_dora",
}
"""PEFT's names of a LoRA's settings by ours."""


@dataclass(frozen=True)
class SidecarFiles:
    """What another program keeps of an adapter beside PEFT's two files; see axolotl.py.

    Args:
        tensors: By name.
        settings: Of the run; empty where no file has them.
    """

    tensors: dict[str, Tensor]
    settings: dict[str, Any]


def _check_printable(text: str) -> str:
    if plain(text) != text or "\n" in text:
        raise ValueError(f"must be a text without control characters, got {shown(text)}")
    return text


Text = Annotated[str, StringConstraints(max_length=4096), AfterValidator(_check_printable)]
"""A text that can be shown."""


def _check_texts(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | dict) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"must be a text or a list of texts, got {shown(value)}")
    for text in texts:
        _check_printable(text)
    return value


def _check_targets(value: Any) -> Any:
    if isinstance(value, dict) and not all(isinstance(wanted, bool) for wanted in value.values()):
        raise ValueError(f"must say true or false of each name, got {shown(value)}")
    return _check_texts(value)


def _check_indices(value: Any) -> Any:
    indices = value if isinstance(value, list) else [value]
    if not all(isinstance(index, int) for index in indices):
        raise ValueError(f"must be a whole number or a list of them, got {shown(value)}")
    return value


def _check_choice(value: Any) -> Any:
    if not isinstance(value, bool | str):
        raise ValueError(f"must be true, false or a text, got {shown(value)}")
    return value if isinstance(value, bool) else _check_printable(value)


class _Fields(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)


class BaseFields(_Fields):
    """What a record says of the base model."""

    model_type: Text | None = None
    fingerprint: Text | None = None
    num_parameters: NonNegativeInt | None = None
    quantization: Text | None = None


class AdapterRecord(_Fields):
    """What loraloom adds to other libraries' fields."""

    version: int = 1
    base: BaseFields = BaseFields()
    adapter: dict[str, Any] = {}
    """Settings of the method that the layout has no field for."""
    prompt: PromptForm | None = None
    """How its training data wrote prompts; None where nobody knows."""


class AdapterFields(_Fields):
    """Fields of adapter_config.json that layouts and methods ask about, of PEFT and MoE-PEFT.

    Here it is made sure that each is of its kind. Values are checked when the method's
    configuration is built from them.
    """

    peft_type: Text | None = None
    base_model_name_or_path: Text | None = None
    task_type: Text | None = None
    bias: Text | None = None
    target_modules: Annotated[Any, AfterValidator(_check_targets)] = None
    exclude_modules: Annotated[Any, AfterValidator(_check_texts)] = None
    modules_to_save: list[Text] | None = None
    layers_to_transform: Annotated[Any, AfterValidator(_check_indices)] = None
    layers_pattern: Annotated[Any, AfterValidator(_check_texts)] = None
    rank_pattern: dict[Text, int] | None = None
    alpha_pattern: dict[Text, float] | None = None
    init_lora_weights: Annotated[Any, AfterValidator(_check_choice)] = None
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None
    trainable_token_indices: list[NonNegativeInt] | dict[Text, list[NonNegativeInt]] | None = None
    ensure_weight_tying: bool | None = None
    routing_strategy: Text | None = None
    act_fn: Text | None = None
    lora_init: Text | None = None
    expert_lora: dict[str, Any] | None = None
    loraloom: AdapterRecord | None = None


_Kind = TypeVar("_Kind", bound=_Fields)


def checked_fields(kind: type[_Kind], values: Mapping[str, Any], origin: str) -> _Kind:
    """Read fields of a kind; null is as good as no field."""
    given = {
        name: value
        for name, value in values.items()
        if value is not None or name not in kind.model_fields
    }
    return checked(kind, given, FormatError, f"{origin}: ")


@dataclass(frozen=True)
class AdapterFiles:
    """The files of an adapter, before anything in them is understood."""

    config: dict[str, Any]
    """Fields of adapter_config.json, each of its kind."""
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    """The header of the safetensors file."""
    source: str = "the adapter"
    """Where they came from, for messages."""
    sidecar: SidecarFiles | None = None
    own: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors of modules that the adapter has as its own, by our keys, once they are set apart."""
    given: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the method that the user gives: what files lack, or in place of theirs."""
    program: str | None = None
    """Which program wrote them, where they have been brought into another layout."""

    def error(self, message: str) -> FormatError:
        """Make an error that names these files."""
        return FormatError(f"{self.source}: {message}")

    def required(self, name: str) -> Any:
        """Take a field that the configuration must have."""
        if name not in self.config:
            raise self.error(f"{CONFIG_FILE} must have the field `{name}`, it is missing")
        return self.config[name]

    def section(self, name: str) -> dict[str, Any]:
        """Take a field that holds fields, {} where it is missing."""
        return self.config.get(name, {})

    def targets(self, projections: Sequence[str]) -> tuple[str, ...]:
        """Name the targets: those listed, and the projections that have tensors.

        A name in `target_modules` that matches nothing has no effect in PEFT and MoE-PEFT; it is
        kept here and dropped when the adapter meets a base model without such a module. A pattern
        (a string) is left to the tensors.
        """
        modules = self.config.get("target_modules")
        if isinstance(modules, dict):
            modules = [name for name, wanted in modules.items() if wanted]
        listed = modules if isinstance(modules, list) else []
        names = [name.rpartition(".")[2] for name in listed]
        return tuple(dict.fromkeys([*names, *projections]))
