"""`loraloom combine`: one adapter of several that were trained apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter
from pydantic import Field
from rich.console import Console
from typing_extensions import override

from loraloom.adapters.routed import of_experts
from loraloom.cli.options import HostOptions
from loraloom.config.data import Scoring, TaskName, is_task_file, skills_lands
from loraloom.errors import ConfigError
from loraloom.formats.disk import refuse_to_overwrite
from loraloom.generation.loading import check_sources, load_host
from loraloom.generation.router import RouterFit, fit_router
from loraloom.models.host import Host
from loraloom.terminal import make_console, make_table, print_tables

# Options that only some ways of combining read.
_ONLY = {
    ("prompt",): ("prompts", "scoring", "limit", "num_layers_read"),
    ("prompt", "arrow"): ("top_k",),
    ("cat", "linear", "svd"): ("weight",),
}


class CombineOptions(HostOptions):
    """Adapters on their base model, and what is made of them."""

    by: Literal["prompt", "arrow", "cat", "linear", "svd"] = "prompt"
    """prompt: all of them, one of which a router chooses for each prompt; arrow: all of them,
    weighed for each token, without training; cat, linear, svd: a single one, their weighted sum."""
    prompts: tuple[str, ...] = ()
    """Of an adapter, for prompt: NAME=DATA, where to read prompts of its kind, a task's name, a
    task's .yaml file, or a data set in the form that the adapter was trained on."""
    scoring: Scoring = "label"
    """How tasks write prompts."""
    limit: int = Field(default=200, ge=2)
    """Most prompts of an adapter."""
    weight: tuple[str, ...] = ()
    """Of an adapter, for cat, linear and svd: NAME=NUMBER, a factor of what it adds."""
    top_k: int | None = Field(default=None, ge=1)
    """Adapters that are used at once; by default one for a prompt, three for a token."""
    num_layers_read: int = Field(default=0, ge=0)
    """For prompt: read the states behind so many decoder layers; 0: the embeddings."""
    overwrite: bool = False
    """Replace an adapter that is there."""

    @override
    def contradictions(self) -> Iterator[str]:
        for ways, names in _ONLY.items():
            for name in sorted(self.model_fields_set & {*names}) if self.by not in ways else ():
                option, allowed = name.replace("_", "-"), " or ".join(ways)
                yield f"--{option} has an effect with --by {allowed} only; leave it out"

    def of_adapters(self, option: str, texts: Sequence[str]) -> dict[str, str]:
        """Split NAME=VALUE, of adapters that are there."""
        split = (text.partition("=") for text in texts)
        found = {name: value for name, _, value in split}
        if odd := [name for name, value in found.items() if not value or name not in self.adapters]:
            raise ConfigError(
                f"--{option} must be NAME=VALUE, of an adapter among "
                f"{', '.join(self.adapters) or 'those of --adapter NAME=PATH'}, got {odd[0]!r}"
            )
        return found


def combine(output: Path, /, *, options: Annotated[CombineOptions, Parameter(name="*")]) -> None:
    """Make one adapter of several that were trained apart.

    Args:
        output: A directory to write.
    """
    adapters, console = options.adapters, make_console(soft_wrap=True)
    if options.derived:
        raise ConfigError(
            f"--adapter takes NAME=PATH here, got {options.derived[0]}; name adapters alone, and "
            "factors as --weight NAME=NUMBER, for --by cat, linear and svd"
        )
    if len(adapters) < 2:
        raise ConfigError(f"--adapter must name two adapters or more, got {len(adapters)}")
    prompts = options.of_adapters("prompts", options.prompts)
    weights = options.of_adapters("weight", options.weight)
    if options.by == "prompt" and (missing := adapters.keys() - prompts.keys()):
        raise ConfigError(f"--prompts must be given for each adapter, {min(missing)} has none")
    if not options.overwrite:
        refuse_to_overwrite(output)
    check_sources(options, adapters)
    host, tokenizer = load_host(options, adapters)
    names, combined = list(adapters), "combined"
    while combined in adapters:
        combined += "-"
    if options.by in ("prompt", "arrow"):
        settings = options.model_dump(include={"top_k", "num_layers_read"})
        experts = {name: name for name in names}
        host.add(combined, of_experts(experts, router=options.by, **settings))
        if options.by == "prompt":
            sources = {name: _source(host, name, prompts[name], options.scoring) for name in names}
            fit = fit_router(host, tokenizer, combined, sources, limit=options.limit)
            _tell(console, fit)
    else:
        try:
            factors = [float(weights.get(name, 1)) for name in names]
        except ValueError as error:
            raise ConfigError(f"--weight must be NAME=NUMBER: {error}") from None
        host.combine(names, factors, options.by, name=combined)
    host.save(combined, output, overwrite=options.overwrite)
    console.print(f"wrote {output}: {', '.join(names)} as one, by {options.by}")


def _source(host: Host, name: str, data: str, scoring: Scoring) -> Mapping[str, Any]:
    """Describe where an adapter's prompts are, as under `data:` in a run file."""
    if is_task_file(data) or skills_lands(data) or data in get_args(TaskName):
        return {"task": data, "scoring": scoring}
    form = host.adapter(name).prompt
    if form is None or form.format == "task":
        raise ConfigError(
            f"--prompts of {name} must be a task's name, as its files don't say how rows of a data "
            f"set are written, got {data!r}"
        )
    return {"dataset": data, **form.model_dump(exclude_none=True, exclude={"system"})}


def _tell(console: Console, fit: RouterFit) -> None:
    table = make_table("prompts of", values=["held out", "right", "chosen instead"])
    for name, chosen in fit.chosen.items():
        others = sorted(chosen.keys() - {name}, key=lambda one: -chosen[one])
        wrong = ", ".join(f"{one} {chosen[one]}" for one in others)
        table.add_row(name, str(sum(chosen.values())), str(chosen.get(name, 0)), wrong)
    print_tables(console, [table])
    console.print(f"The router is right about {fit.accuracy:.1%} of prompts that it hadn't seen.")
