"""Which methods there are, and how a further one is registered."""

import sys
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Annotated, Any, TypeVar, Union

from pydantic import Field, TypeAdapter

from loraloom.adapters.contract import AdapterConfig
from loraloom.errors import ConfigError

CONFIGS: list[type[AdapterConfig]] = []
"""The methods that are known."""
LISTENERS: list[Callable[[], object]] = []
"""What is called whenever a further method has been registered."""
_METHOD = TypeVar("_METHOD", bound=type[AdapterConfig])


def any_method() -> Any:
    """The type of the settings of all methods that are known now."""
    return Union[tuple(CONFIGS)]  # noqa: UP007


def parse_adapter_config(settings: Mapping[str, Any]) -> AdapterConfig:
    """Check the settings of an adapter, as in the `adapter:` section of a run file."""
    any_config: Any = Annotated[any_method(), Field(discriminator="method")]  # ty: ignore[invalid-type-form]
    return TypeAdapter(any_config).validate_python(dict(settings))


def check_config(config: object) -> AdapterConfig:
    """Return a configuration as it came; a ConfigError if it is of another library, or none."""
    if isinstance(config, AdapterConfig):
        return config
    kind = type(config)
    raise ConfigError(
        "an adapter's configuration must be one of loraloom's, as LoraConfig(rank=8, alpha=16), "
        f"got {kind.__module__}.{kind.__qualname__}"
    )


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
    for name in ("peft_type", "title", "formula"):
        if not hasattr(config, name):
            raise ConfigError(f"{config.__name__}.{name} must be a string, got none")
    if config.layout != "native":
        raise ConfigError(f'{config.__name__}.layout must be "native", got {config.layout!r}')
    name = config.model_fields["method"].default
    if not isinstance(name, str):
        raise ConfigError(f"{config.__name__}.method must have a name as its default, got none")
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
