"""`loraloom quickstart`: adapters trained separately, combined into one, and a page of results."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Annotated

from cyclopts import Parameter, validators
from rich.console import Console
from rich.table import Table

from loraloom.adapters.routed.method import of_experts
from loraloom.atomic_io import write_output
from loraloom.base.loading import find_device, load_base_model
from loraloom.cli.options import BASE
from loraloom.cli.train import raise_failures
from loraloom.config.fields import checked
from loraloom.config.model import check_device
from loraloom.config.text import parse_yaml, read_text
from loraloom.data import tiny_base
from loraloom.data.templates import compile_template, render
from loraloom.eval.evaluation import evaluate
from loraloom.eval.results import Evaluation
from loraloom.generation.router import fit_router
from loraloom.host.host import attach
from loraloom.report.page import make_page
from loraloom.terminal import make_console, make_table, print_tables, show_progress
from loraloom.training.reporting import Progress
from loraloom.training.run import train
from loraloom.training.run_directory import RunDirectory
from loraloom.training.settings import RunConfig

NUM_LANDS = 8
BASE_STEPS = 4000
TOGETHER = "together"
ROUTED = "one"
CAUTION = """\
Each of the eight adapters was trained only on the rows of its country, which each question names.
See docs/combine.md to combine your adapters, and docs/when_a_mixture.md for mixtures that are
trained jointly."""


def quickstart(
    *,
    output_dir: Path = Path("quickstart"),
    overwrite: bool = False,
    resume: bool = False,
    max_steps: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 150,
    device: str = "auto",
) -> None:
    """Train eight adapters on separate data in the same steps, and combine them into one.
    Nothing is downloaded: the data set, `skills@8` (small rules in eight fictional countries),
    and a tiny base model are generated. Takes about three minutes on two CPU cores.

    Args:
        output_dir: Write adapters, metrics and a page of results to this directory.
        overwrite: Replace an earlier quickstart's results.
        resume: Resume an interrupted quickstart.
        max_steps: Train for N steps.
        device: Run on auto (an accelerator if available), cpu, cuda, cuda:0, xpu or mps.
    """
    console = make_console(soft_wrap=True)
    find_device(check_device(device))  # one that isn't there is an error now, not minutes later
    run = _run_config(output_dir, max_steps, device)
    RunDirectory(run.output_dir).check(resume=resume, overwrite=overwrite)
    _make_base(console, Path(run.base_model))
    model, tokenizer = load_base_model(run.base_model, device=device)
    host = attach(model)
    console.print(
        f"Training {NUM_LANDS} adapters, each on separate rows, and one adapter on all rows"
    )
    results = train(
        run,
        resume=resume,
        overwrite=overwrite,
        progress=Progress(make_console()),
        base=(host, tokenizer),
    )
    raise_failures(results)
    for job in run.jobs:
        host.load(job.name, run.output_dir / job.name)
    sources = {job.name: job.data.sources[0] for job in run.jobs if job.name != TOGETHER}
    host.add(ROUTED, of_experts({land: land for land in sources}))
    fit_router(host, tokenizer, ROUTED, sources)
    host.save(ROUTED, run.output_dir / ROUTED, overwrite=True)
    console.print(f"\nCombined the {NUM_LANDS} adapters, with a router by prompt; evaluating")
    tasks = {land: str(source.task) for land, source in sources.items()}
    evaluation = evaluate(
        host,
        tokenizer,
        list(tasks.values()),
        [None, *tasks, TOGETHER, ROUTED],
        scoring="text",
        split="test",
        pairs=[(ROUTED, TOGETHER)],
    )
    evaluation.write(output_dir / "eval.json")
    findings = _findings(evaluation, tasks)
    console.print(f"\n{findings}\n\nAdapters that the router chooses:")
    print_tables(console, [_choices_table(evaluation, tasks)])
    console.print(CAUTION)
    page = make_page([run.output_dir], [output_dir / "eval.json"], summary=findings)
    write_output(output_dir / "report.html", page)
    console.print(f"\nAdapters are in {run.output_dir}, a page in {output_dir}/report.html")


def _run_config(output: Path, max_steps: int, device: str) -> RunConfig:
    file = Path(__file__).with_suffix(".yaml.jinja")
    template = compile_template(read_text(file), file.name)
    fields = {
        "base_model": str(output / "base"),
        "output_dir": str(output / "adapters"),
        "device": device,
        "num_lands": NUM_LANDS,
        "max_steps": max_steps,
    }
    return checked(RunConfig, parse_yaml(render(template, fields), file.name))


def _make_base(console: Console, directory: Path) -> None:
    if directory.is_dir():
        console.print(f"Using the tiny base model in {directory}")
        return
    console.print("Generating a tiny base model of three layers (about two minutes)")
    with show_progress(console, "base model", [1] * BASE_STEPS) as advance:
        tiny_base.make_tiny_base(directory, BASE_STEPS, on_step=lambda step: advance([step]))


def _choices_table(evaluation: Evaluation, tasks: Mapping[str, str]) -> Table:
    table = make_table("questions of", values=list(tasks))
    routing = evaluation.routing[ROUTED]["tasks"]
    for land, task in tasks.items():
        shares = routing[task]["load"][0]
        table.add_row(land, *[f"{share:.0%}" if share else "" for share in shares])
    return table


def _findings(evaluation: Evaluation, tasks: Mapping[str, str]) -> str:
    lands = list(tasks)
    num_lands = len(lands)
    adapters_of = {
        "base model": [BASE] * num_lands,
        "the adapter of another country": [*lands[1:], lands[0]],
        f"{TOGETHER}: as large, trained on all rows": [TOGETHER] * num_lands,
        f"{ROUTED}: the {num_lands} adapters and a router": [ROUTED] * num_lands,
        "the adapter of the question's country": lands,
    }
    lines = ["Accuracy on new questions of all countries, %"]
    for label, adapters in adapters_of.items():
        accuracies = []
        for adapter, task in zip(adapters, tasks.values(), strict=True):
            accuracies.append(evaluation.results[adapter][task]["accuracy"] or 0)
        lines.append(f"  {label:44}{100 * fmean(accuracies):5.1f}")
    return "\n".join(lines)
