"""Methods: a file for each, and the list of them."""

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, Union

from pydantic import Field, TypeAdapter

from loraloom.adapters.dynmole import DynMoleConfig
from loraloom.adapters.hydralora import HydraLoraConfig
from loraloom.adapters.lora import LoraConfig
from loraloom.adapters.loramoe import LoraMoeConfig
from loraloom.adapters.method import AdapterConfig
from loraloom.adapters.mixlora import ExpertsConfig as ExpertsConfig
from loraloom.adapters.mixlora import MixLoraConfig
from loraloom.adapters.mixlora import SharedExpertConfig as SharedExpertConfig
from loraloom.adapters.mola import MolaConfig
from loraloom.adapters.moslora import MosLoraConfig
from loraloom.adapters.smora import SmoraConfig
from loraloom.adapters.vera import VeraConfig
from loraloom.errors import ConfigError

# The methods. To add one, import its configuration above and name it here; see also
# `register_method`.
CONFIGS: list[type[AdapterConfig]] = [
    LoraConfig,
    MixLoraConfig,
    VeraConfig,
    HydraLoraConfig,
    MolaConfig,
    MosLoraConfig,
    LoraMoeConfig,
    DynMoleConfig,
    SmoraConfig,
]

# What a base model of an unknown type is tried with; experts do nothing until they are trained.
TRIALS: Mapping[str, AdapterConfig] = {
    "attention": LoraConfig(rank=4, alpha=8, target_modules="attention"),
    "ffn": LoraConfig(rank=4, alpha=8, target_modules="ffn"),
    "mixture": MixLoraConfig(rank=2, num_experts=2, top_k=1),
}


def any_method() -> Any:
    """The type of the settings of all methods that are known now."""
    return Union[tuple(CONFIGS)]  # noqa: UP007


_METHOD = TypeVar("_METHOD", bound=type[AdapterConfig])
_LISTENERS: list[Callable[[], object]] = []


def parse_adapter_config(settings: Mapping[str, Any]) -> AdapterConfig:
    """Check the settings of an adapter, as in the `adapter:` section of a run file."""
    known: Any = Annotated[any_method(), Field(discriminator="method")]
    return TypeAdapter(known).validate_python(dict(settings))


def register_method(config: _METHOD) -> _METHOD:
    """Make a method of your own known to run files, `load`, the server and `loraloom.peft`.

    Only this process knows it then. A package makes it known to every process where it is
    installed, workers of a cluster and `loraloom` itself among them, by an entry point of the group
    `loraloom.methods` that names the configuration.

    Args:
        config: The method's configuration; docs/methods.md says how to write one.

    Returns:
        The same, so that it can decorate the class.

    Raises:
        ConfigError: If its `method` or `peft_type` is taken.
    """
    name = config.model_fields["method"].default
    for known in CONFIGS:
        names = {known.model_fields["method"].default, *known.aliases}
        if known is not config and (name in names or config.peft_type == known.peft_type):
            raise ConfigError(
                f"method {name!r} with peft_type {config.peft_type!r} must have names of its own, "
                f"{known.__name__} has one of them; rename it"
            )
    if config not in CONFIGS:
        CONFIGS.append(config)
        for listener in _LISTENERS:
            listener()
    return config


def when_registered(listener: Callable[[], object]) -> None:
    """Call something whenever a further method has been registered."""
    _LISTENERS.append(listener)


for _entry in entry_points(group="loraloom.methods"):
    # A package that is imported first, and imports loraloom, registers its method by itself.
    if getattr(getattr(sys.modules.get(_entry.module), "__spec__", None), "_initializing", False):
        continue
    try:
        register_method(_entry.load())
    except Exception as error:
        where = _entry.dist and _entry.dist.name
        raise ImportError(
            f"the method {_entry.value} of the package {where} can't be loaded: {error}; mend or "
            "uninstall it"
        ) from error

if TYPE_CHECKING:
    AnyAdapterConfig = AdapterConfig
else:
    AnyAdapterConfig = Annotated[any_method(), Field(discriminator="method")]
