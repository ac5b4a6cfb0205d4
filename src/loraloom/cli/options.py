"""What several verbs' options are: a base model with adapters on it, and `--set`."""

import sys
from collections.abc import Iterable, Iterator
from typing import Annotated, Any

from cyclopts import Group, Parameter

from loraloom.adapters.routed.method import prompt_router_of
from loraloom.adapters.weighted_sum import is_sum, parse_sum
from loraloom.config.fields import check_name
from loraloom.config.model import BaseModelConfig
from loraloom.errors import ConfigError

BASE = "base"  # what files and options call the base model

Text = Annotated[str, Parameter(allow_leading_hyphen=True)]
Sets = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        allow_leading_hyphen=True,
        help="Change a setting: PATH=VALUE, as jobs.0.train.learning_rate=1e-4. Repeatable.",
    ),
]


class Section:
    """Sections of a verb's help, in their order."""

    DATA = Parameter(group=Group("Data and prompts", sort_key=0))
    RESULTS = Parameter(group=Group("Results", sort_key=1))
    SERVER = Parameter(group=Group("Server", sort_key=2))
    LIMITS = Parameter(group=Group("Limits", sort_key=3))
    SAMPLING = Parameter(group=Group("Sampling", sort_key=4))
    MODEL = Parameter(group=Group("Base model and adapters", sort_key=5))


def is_derived(name: str) -> bool:
    """Whether a name is of a sum of adapters, or of a routed one's expert."""
    return is_sum(name) or "/" in name


class HostOptions(BaseModelConfig):
    """A base model with adapters on it."""

    adapter: tuple[str, ...] = ()
    """Load NAME=PATH (a directory or Hub ID); or use a sum, law:0.7+math:0.3, or an expert,
    auto/law. Repeatable."""

    @property
    def adapters(self) -> dict[str, str]:
        adapters: dict[str, str] = {}
        for text in self.adapter:
            name, _, path = text.partition("=")
            if "=" not in text and is_derived(name):
                continue
            if not (name and path) or name in (BASE, *adapters):
                raise ConfigError(
                    f"--adapter must be NAME=PATH, where NAME is new and not {BASE!r}, got {text!r}"
                )
            adapters[check_name(name)] = path
        return adapters

    @property
    def names(self) -> list[str]:
        return [*self.adapters, *self.derived]

    @property
    def derived(self) -> list[str]:
        names = [name for name in self.adapter if "=" not in name and is_derived(name)]
        for name in names:
            self.check_derived(name)
        if len({(is_sum(name), parse_sum(name)) for name in names}) < len(names):
            raise ConfigError(f"--adapter must name each adapter once, got {', '.join(names)}")
        return names

    def check_derived(self, name: str) -> str:
        """Return the name of a sum or expert as it came, or raise a LoraloomError."""
        adapters = [term.partition("/")[0] for term, _ in parse_sum(name)]
        for adapter in adapters:
            if adapter not in self.adapters:
                raise ConfigError(
                    f"adapter {adapter!r} of {name!r} is not loaded; load a directory or Hub ID as "
                    "--adapter NAME=PATH"
                )
        return name

    def misused(self, names: Iterable[str], reason: str) -> Iterator[str]:
        for name in sorted(self.model_fields_set.intersection(names)):
            yield f"--{name.replace('_', '-')} {reason}"


def tell_unknown_prompts(host: Any, tokenizer: Any) -> None:
    """Say which adapters don't record the form of their prompts, if that makes a difference."""
    # a routed adapter's experts are read each in its own form, where one is chosen by prompt
    names: list[str] = []
    for name, adapter in host.adapters.items():
        is_routed = prompt_router_of(adapter) is not None
        readers = adapter.members.values() if is_routed else [adapter]
        if all(reader.prompt is None for reader in readers):
            names.append(name)
    if names and tokenizer.chat_template:
        print(
            f"note: the files of {', '.join(names)} do not record a prompt form; using the base "
            "model's chat template",
            file=sys.stderr,
        )
