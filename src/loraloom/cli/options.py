"""What several verbs' options are: paths, adapters, and a base model with adapters on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, Token
from pydantic import AfterValidator, Field
from typing_extensions import override

from loraloom.config.fields import CheckInfo, StrictModel, check_name
from loraloom.config.model import BaseModelConfig
from loraloom.config.text import local_path
from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraloom.models.host import Host

# What files and options call the base model.
BASE = "base"


def _read_path(kind: Any, tokens: Sequence[Token]) -> Any:
    paths = [local_path(token.value, token.keyword or "the path") for token in tokens]
    return paths[0] if kind is Path else paths


def _check_path(path: Path, info: CheckInfo) -> Path:
    return local_path(path, str(info.field_name))


# A path that the system can be asked about.
LocalPath = Annotated[Path, Parameter(converter=_read_path), AfterValidator(_check_path)]

LocalPaths = Annotated[
    list[Annotated[Path, AfterValidator(_check_path)]], Parameter(converter=_read_path)
]

# A text, which may look like an option.
Text = Annotated[str, Parameter(allow_leading_hyphen=True)]

Sets = Annotated[
    list[str],
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
    """An adapter to load, NAME=PATH: from a directory or hub id, under this name. May be
    repeated."""

    @property
    def adapters(self) -> dict[str, str]:
        """Where to load each adapter from, by name, in their order."""
        return parse_adapters(self.adapter)


class RayOptions(StrictModel):
    """A cluster that shares the work."""

    ray: str | None = None
    """Spread the work over the devices of a Ray cluster: auto (the one that runs on this machine,
    else one that lasts as long as the command) or HOST:PORT."""
    ray_workers: int | None = Field(default=None, ge=1)
    """With --ray: use N devices; by default all accelerators, else one worker on each machine."""

    @override
    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.ray_workers is not None and self.ray is None:
            yield "--ray-workers has no effect without --ray; give it"


def parse_adapters(texts: Sequence[str]) -> dict[str, str]:
    """Names and paths of `name=path`; a name is a safe file name, and none is given twice."""
    adapters: dict[str, str] = {}
    for text in texts:
        name, _, path = text.partition("=")
        if not name or not path:
            raise ConfigError(f"--adapter must be name=path, got {text!r}")
        if name == BASE or name in adapters:
            raise ConfigError(
                f"--adapter {text}: name must differ from base, which is the base model, and from "
                "other adapters' names"
            )
        try:
            adapters[check_name(name)] = path
        except ConfigError as error:
            raise ConfigError(f"--adapter {text}: {error}") from None
    return adapters


def tell_unknown_prompts(host: Host, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say which adapters don't record the form of their prompts, if that makes a difference."""
    names = [name for name, adapter in host.adapters.items() if adapter.prompt is None]
    if names and tokenizer.chat_template:
        print(
            f"note: {', '.join(names)}: the adapter's files don't record how its training data "
            "wrote prompts; the base model's chat template is used",
            file=sys.stderr,
        )
