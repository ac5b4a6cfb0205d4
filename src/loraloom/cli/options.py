"""What several verbs' options are: a base model with adapters on it, and `--set`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from loraloom.adapters.weighted_sum import is_sum, parse_sum
from loraloom.config.fields import check_name
from loraloom.config.model import BaseModelConfig
from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraloom.models.host import Host

# What files and options call the base model.
BASE = "base"

# A text, which may look like an option.
Text = Annotated[str, Parameter(allow_leading_hyphen=True)]

Sets = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        allow_leading_hyphen=True,
        help="Change a setting, PATH=VALUE: jobs.0.train.learning_rate=1e-4, for example. May be "
        "repeated.",
    ),
]


class HostOptions(BaseModelConfig):
    """A base model with adapters on it."""

    adapter: tuple[str, ...] = ()
    """An adapter to load, NAME=PATH: from a directory or hub id, under this name; or a sum of such,
    law:0.7+math:0.3. May be repeated."""

    @property
    def adapters(self) -> dict[str, str]:
        """Where to load each adapter from, by name, in their order."""
        adapters: dict[str, str] = {}
        for text in self.adapter:
            name, _, path = text.partition("=")
            if not path and is_sum(name):
                continue
            if not (name and path) or name in (BASE, *adapters):
                raise ConfigError(
                    f"--adapter must be NAME=PATH, with a name that is neither {BASE} nor that of "
                    f"another one, got {text!r}"
                )
            adapters[check_name(name)] = path
        return adapters

    @property
    def sums(self) -> list[str]:
        """Sums of these adapters that answer beside them."""
        sums = [self.sum_of(text) for text in self.adapter if "=" not in text and is_sum(text)]
        if len({*map(parse_sum, sums)}) < len(sums):
            raise ConfigError(f"--adapter must not give a sum twice, got {', '.join(sums)}")
        return sums

    def sum_of(self, text: str) -> str:
        """Return a sum of these adapters as it came, or raise a LoraloomError."""
        if missing := [name for name, _ in parse_sum(text) if name not in self.adapters]:
            raise ConfigError(
                f"a sum must be of adapters that --adapter NAME=PATH loads, got {missing[0]} in "
                f"{text}"
            )
        return text


def tell_unknown_prompts(host: Host, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say which adapters don't record the form of their prompts, if that makes a difference."""
    names = [name for name, adapter in host.adapters.items() if adapter.prompt is None]
    if names and tokenizer.chat_template:
        print(
            f"note: {', '.join(names)}: the adapter's files don't record how its training data "
            "wrote prompts; the base model's chat template is used",
            file=sys.stderr,
        )
