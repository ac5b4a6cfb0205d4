"""The raw files of an adapter, and what all layouts on disk read from them alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraloom.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class AdapterFiles:
    """The files of an adapter, before anything in them is understood."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    """The header of the safetensors file."""
    source: str = "the adapter"
    """Where they came from, for messages."""

    def error(self, message: str) -> FormatError:
        """Make an error that names these files."""
        return FormatError(f"{self.source}: {message}")

    def required(self, name: str) -> Any:
        """Take a field that the configuration must have."""
        if name not in self.config:
            raise self.error(f"{CONFIG_FILE} must have the field `{name}`, it is missing")
        return self.config[name]

    def section(self, name: str) -> dict[str, Any]:
        """Take a field that holds fields, {} where it is missing or null."""
        value = self.config.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.error(f"`{name}` in {CONFIG_FILE} must be an object, got {value!r}")
        return value

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
        names = [str(name).rpartition(".")[2] for name in listed]
        return tuple(dict.fromkeys([*names, *projections]))
