"""Methods: a file for each, and the list of them."""

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args

from pydantic import Field

from loraloom.adapters.contract import CONFIGS as CONFIGS
from loraloom.adapters.contract import AdapterConfig, any_method
from loraloom.adapters.contract import parse_adapter_config as parse_adapter_config
from loraloom.adapters.dynmole import DynMoleConfig
from loraloom.adapters.hydralora import HydraLoraConfig
from loraloom.adapters.lora import LoraConfig
from loraloom.adapters.loramoe import LoraMoeConfig
from loraloom.adapters.mixlora import ExpertsConfig as ExpertsConfig
from loraloom.adapters.mixlora import MixLoraConfig
from loraloom.adapters.mixlora import SharedExpertConfig as SharedExpertConfig
from loraloom.adapters.mola import MolaConfig
from loraloom.adapters.moslora import MosLoraConfig
from loraloom.adapters.routed.method import RoutedConfig
from loraloom.adapters.smora import SmoraConfig
from loraloom.adapters.vera import VeraConfig
from loraloom.errors import ConfigError, shown

# To add a method, import its configuration above and name it here; see also `register_method`.
CONFIGS[:] = [
    LoraConfig,
    MixLoraConfig,
    VeraConfig,
    HydraLoraConfig,
    MolaConfig,
    MosLoraConfig,
    LoraMoeConfig,
    DynMoleConfig,
    SmoraConfig,
    RoutedConfig,
]

# What a base model of an unknown type is tried with; experts do nothing until they are trained.
TRIALS: Mapping[str, AdapterConfig] = {
    "attention": LoraConfig(rank=4, alpha=8, target_modules="attention"),
    "ffn": LoraConfig(rank=4, alpha=8, target_modules="ffn"),
    "experts": LoraConfig(rank=4, alpha=8, target_modules="experts"),
    "moe": LoraConfig(rank=4, alpha=8, target_modules="moe"),
    "mixture": MixLoraConfig(rank=2, num_experts=2, top_k=1),
}


_METHOD = TypeVar("_METHOD", bound=type[AdapterConfig])
LISTENERS: list[Callable[[], object]] = []
"""What is called whenever a further method has been registered."""


def register_method(config: _METHOD) -> _METHOD:
    """Register your own method for run files, `load`, the server and `loraloom.peft`.

    Only this process knows the method then. For all processes, workers of a cluster and the
    command line included, install a package with an entry point of the group `loraloom.methods`
    that names the configuration.

    Args:
        config: Configuration of the method; docs/add_a_method.md explains how to write one.

    Returns:
        The configuration, so that `register_method` can decorate the class.

    Raises:
        ConfigError: If the configuration is incomplete, or `method` or `peft_type` is taken.
    """
    if lacking := ", ".join(_lacking(config)):
        raise ConfigError(f"a method's configuration must have {lacking}, got {shown(config)}")
    name = config.model_fields["method"].default
    for existing in list(CONFIGS):
        names = {existing.model_fields["method"].default, *existing.aliases}
        if existing is config or (name not in names and config.peft_type != existing.peft_type):
            continue
        if (existing.__module__, existing.__qualname__) != (config.__module__, config.__qualname__):
            raise ConfigError(
                f"method {name!r} or peft_type {config.peft_type!r} is already registered for "
                f"{existing.__name__}; choose other names"
            )
        CONFIGS.remove(existing)  # a notebook's cell that defines it is run again
    if config not in CONFIGS:
        config.package = config.__module__.partition(".")[0].replace("__main__", "")
        CONFIGS.append(config)
        for listener in LISTENERS:
            listener()
    return config


def _lacking(config: Any) -> Iterator[str]:
    if not isinstance(config, type) or not issubclass(config, AdapterConfig):
        yield "the base class AdapterConfig"
        return
    attributes = {n: v for base in reversed(config.__mro__) for n, v in vars(base).items()}
    for name in ("peft_type", "title", "formula"):
        value = attributes.get(name)
        if not isinstance(value, property) and not (isinstance(value, str) and value.strip()):
            yield f"a {name} (string)"
    method = config.model_fields["method"]
    if get_args(method.annotation) != (method.default,):
        yield 'method: Literal["name"] = "name"'
    if config.__abstractmethods__:
        yield f"the functions {', '.join(sorted(config.__abstractmethods__))}"
    if config.layout != "native":
        yield 'layout = "native"'


def take_entries(group: str, take: Callable[[Any, str], object]) -> None:
    """Load what packages name in a group of entry points, each with the name of its package."""
    for entry in entry_points(group=group):
        # A package that is imported first, and imports loraloom, registers by itself.
        module = sys.modules.get(entry.module)
        if getattr(getattr(module, "__spec__", None), "_initializing", False):
            continue
        package = entry.dist.name if entry.dist else ""
        try:
            take(entry.load(), package)
        except Exception as error:
            raise ImportError(
                f"{entry.value} of {group} in the package {package} cannot be loaded: {error}; "
                f"repair or uninstall {package}"
            ) from error


def _take(config: Any, package: str) -> None:
    register_method(config).package = package


take_entries("loraloom.methods", _take)

if TYPE_CHECKING:
    AnyAdapterConfig = AdapterConfig
else:
    AnyAdapterConfig = Annotated[any_method(), Field(discriminator="method")]
