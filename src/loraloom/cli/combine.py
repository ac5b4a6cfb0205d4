"""`loraloom combine`: one adapter of several that were trained apart."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter
from pydantic import Field
from rich.console import Console
from typing_extensions import override

from loraloom.adapters.routed.method import of_experts
from loraloom.cli.init import ROW_FORMATS, infer_source
from loraloom.cli.options import HostOptions, Section
from loraloom.config.data import Scoring, is_task
from loraloom.errors import ConfigError
from loraloom.formats.files import read_adapters
from loraloom.formats.raw_files import refuse_to_overwrite
from loraloom.generation.loading import load_host
from loraloom.generation.router import RouterFit, fit_router
from loraloom.host.host import Host
from loraloom.terminal import make_console, make_table, print_tables

COMBINATION = Parameter(group=Group("Combination", sort_key=-1))

# Options that only some ways of combining read.
_ONLY = {
    ("prompt",): ("prompts", "scoring", "limit", "num_layers_read"),
    ("prompt", "arrow"): ("top_k",),
    ("cat",): ("weight",),
}


class CombineOptions(HostOptions):
    """Adapters on their base model, and what is made of them."""

    by: Annotated[Literal["prompt", "arrow", "cat"], COMBINATION] = "prompt"
    """Keep all adapters and choose one by a router for each prompt (prompt) or mix several for each
    token, without training (arrow); or write the weighted sum of LoRAs (cat)."""
    prompts: Annotated[tuple[str, ...], Section.DATA] = ()
    """Fit the prompt router on NAME=DATA, one per adapter: a task, a task's .yaml file, or rows
    of any format, best the adapter's own. Repeatable."""
    scoring: Annotated[Scoring | None, Section.DATA] = None
    """Write prompts of choices by label or text. Default: label, or the task file's."""
    limit: Annotated[int, Section.DATA] = Field(default=200, ge=2)
    """Read at most N prompts per adapter."""
    weight: Annotated[tuple[str, ...], COMBINATION] = ()
    """Scale an adapter's update, NAME=NUMBER, for cat. Repeatable."""
    top_k: Annotated[int | None, COMBINATION] = Field(default=None, ge=1)
    """Use K adapters at once. Default: one per prompt, three per token."""
    num_layers_read: Annotated[int, COMBINATION] = Field(default=0, ge=0)
    """Route by the hidden states after N decoder layers, for prompt; 0: by the embeddings."""
    overwrite: Annotated[bool, Section.RESULTS] = False
    """Replace an existing adapter."""

    @override
    def contradictions(self) -> Iterator[str]:
        for ways, names in _ONLY.items():
            if self.by not in ways:
                yield from self.misused(names, f"requires --by {' or '.join(ways)}")
        if self.derived:
            yield (
                f"--adapter must be NAME=PATH here, got {self.derived[0]}; pass weights as "
                "--weight NAME=NUMBER with --by cat"
            )
        elif len(self.adapters) < 2:
            yield f"--adapter must name two adapters or more, got {len(self.adapters)}"
        elif self.by == "prompt":
            missing = self.adapters.keys() - self.by_adapter("prompts", self.prompts).keys()
            if missing:
                yield f"--prompts {min(missing)}=DATA is missing; pass --prompts per adapter"

    def by_adapter(self, option: str, texts: Sequence[str]) -> dict[str, str]:
        """Parse NAME=VALUE texts, one for an adapter at most."""
        pairs = [text.partition("=") for text in texts]
        values = {name: value for name, _, value in pairs}
        if len(values) < len(texts):
            raise ConfigError(f"--{option} must name each adapter once, got {', '.join(texts)}")
        for name, value in values.items():
            if not value or name not in self.adapters:
                names = ", ".join(self.adapters)
                raise ConfigError(
                    f"--{option} must be NAME=VALUE, where NAME is one of {names}, got {name!r}"
                )
        return values


def combine(
    output: Path, /, *, options: Annotated[CombineOptions, Parameter(name="*"), Section.MODEL]
) -> None:
    """Combine several trained adapters into one.

    Args:
        output: Directory for the combined adapter.
    """
    adapters = options.adapters
    console = make_console(soft_wrap=True)
    prompts = options.by_adapter("prompts", options.prompts)
    weights = options.by_adapter("weight", options.weight)
    try:
        factors = [float(weights.get(name, 1)) for name in adapters]
    except ValueError as error:
        raise ConfigError(f"--weight must be NAME=NUMBER: {error}") from None
    if not options.overwrite:
        refuse_to_overwrite(output)
    host, tokenizer = load_host(options, read_adapters(adapters))
    combined = "combined"
    while combined in adapters:
        combined += "-"
    if options.by in ("prompt", "arrow"):
        config = of_experts(
            {name: name for name in adapters},
            router=options.by,
            top_k=options.top_k,
            num_layers_read=options.num_layers_read,
        )
        host.add(combined, config)
    else:
        host.combine(list(adapters), factors, name=combined)
    if options.by == "prompt":
        sources = {}
        for name in adapters:
            sources[name] = _source(host, name, prompts[name], options.scoring)
        if options.scoring and not any("task" in source for source in sources.values()):
            raise ConfigError("--scoring requires a task in --prompts, got data sets")
        fit = fit_router(host, tokenizer, combined, sources, limit=options.limit)
        _print_fit(console, fit)
    host.save(combined, output, overwrite=options.overwrite)
    console.print(f"wrote {output}: {', '.join(adapters)} combined by {options.by}")


def _source(host: Host, name: str, data: str, scoring: Scoring | None) -> Mapping[str, Any]:
    if is_task(data):
        return {"task": data, "scoring": scoring} if scoring else {"task": data}
    form = host.adapter(name).prompt
    formats = (form.format, *ROW_FORMATS) if form else ROW_FORMATS
    return infer_source({"dataset": data}, "train", formats)


def _print_fit(console: Console, fit: RouterFit) -> None:
    table = make_table("prompts of", values=["held out", "correct", "chosen instead"])
    for name, chosen in fit.chosen.items():
        wrong = Counter(chosen)
        num_correct = wrong.pop(name, 0)
        num_prompts = num_correct + wrong.total()
        counts = ", ".join(f"{adapter} {count}" for adapter, count in wrong.most_common())
        table.add_row(name, str(num_prompts), str(num_correct), counts)
    print_tables(console, [table])
    console.print(f"The router is correct for {fit.accuracy:.1%} of the held-out prompts.")
