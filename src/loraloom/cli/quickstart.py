"""`loraloom quickstart`: adapters trained separately, combined into one, and a page of results."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from cyclopts import Parameter, validators

from loraloom.adapters.routed.method import of_experts
from loraloom.atomic_io import write_output
from loraloom.base.loading import find_device, load_base_model
from loraloom.cli.options import BASE
from loraloom.cli.train import raise_failures
from loraloom.config.fields import checked
from loraloom.config.text import parse_yaml
from loraloom.data import tiny_base
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
    find_device(device)  # one that isn't there is an error now, not minutes later
    run = _run_config(output_dir, max_steps, device)
    RunDirectory(run.output_dir).check(resume=resume, overwrite=overwrite)
    base = Path(run.base_model)
    if base.is_dir():
        console.print(f"Using the tiny base model in {base}")
    else:
        console.print("Generating a tiny base model of three layers (about two minutes)")
        with show_progress(console, "base model", [1] * BASE_STEPS) as advance:
            tiny_base.make_tiny_base(base, BASE_STEPS, on_step=lambda step: advance([step]))
    model, tokenizer = load_base_model(run.base_model, device=device)
    host = attach(model)
    *lands, together = (job.name for job in run.jobs)
    console.print(
        f"Training {len(lands)} adapters, each on separate rows, and one adapter on all rows"
    )
    progress = Progress(make_console())
    base_model = (host, tokenizer)
    results = train(run, resume=resume, overwrite=overwrite, progress=progress, base=base_model)
    raise_failures(results)
    for name in (*lands, together):
        host.load(name, run.output_dir / name)
    host.add(ROUTED, of_experts({land: land for land in lands}))
    land_jobs = run.jobs[:-1]
    fit_router(host, tokenizer, ROUTED, {job.name: job.data.sources[0] for job in land_jobs})
    host.save(ROUTED, run.output_dir / ROUTED, overwrite=True)
    console.print(f"\nCombined the {len(lands)} adapters, with a router by prompt; evaluating")
    tasks = [str(job.data.task) for job in land_jobs]
    names = [None, *lands, together, ROUTED]
    pairs = [(ROUTED, together)]
    evaluation = evaluate(host, tokenizer, tasks, names, scoring="text", split="test", pairs=pairs)
    evaluation.write(output_dir / "eval.json")
    findings = _findings(evaluation, dict(zip(lands, tasks, strict=True)), together)
    table = make_table("questions of", values=lands)
    for land, routing in zip(lands, evaluation.routing[ROUTED]["tasks"].values(), strict=True):
        table.add_row(land, *(f"{share:.0%}" if share else "" for share in routing["load"][0]))
    console.print(f"\n{findings}\n\nAdapters that the router chooses:")
    print_tables(console, [table])
    console.print(CAUTION)
    page = make_page([run.output_dir], [output_dir / "eval.json"], summary=findings)
    write_output(output_dir / "report.html", page)
    console.print(f"\nAdapters are in {run.output_dir}, a page in {output_dir}/report.html")


def _run_config(output: Path, max_steps: int, device: str) -> RunConfig:
    # the file says what a person would write; lands, steps and places are filled in
    file = files("loraloom.cli") / "quickstart.yaml"
    run = parse_yaml(file.read_text(encoding="utf-8"), "quickstart.yaml")
    run |= {"base_model": str(output / "base"), "output_dir": output / "adapters", "device": device}
    land, together = run["jobs"]
    jobs: list[dict[str, Any]] = []
    for number in range(1, NUM_LANDS + 1):
        data = {**land["data"], "task": f"skills@{number}of{NUM_LANDS}"}
        jobs.append({**land, "name": f"land{number}", "data": data})
    together["data"]["task"] = f"skills@{NUM_LANDS}"
    jobs.append(together)
    for job in jobs:
        job["train"] = {**job["train"], "max_steps": max_steps}
    return checked(RunConfig, {**run, "jobs": jobs})


def _findings(evaluation: Evaluation, tasks: Mapping[str, str], together: str) -> str:
    # of right answers to all questions
    def share(names: Sequence[str]) -> float:
        pairs = zip(names, tasks.values(), strict=True)
        return 100 * fmean(evaluation.results[name][task]["accuracy"] or 0 for name, task in pairs)

    names, many = list(tasks), len(tasks)
    rows = {
        "base model": [BASE] * many,
        "the adapter of another country": [*names[1:], names[0]],
        f"{together}: as large, trained on all rows": [together] * many,
        f"{ROUTED}: the {many} adapters and a router": [ROUTED] * many,
        "the adapter of the question's country": names,
    }
    lines = [f"  {label:44}{share(adapters):5.1f}" for label, adapters in rows.items()]
    return "\n".join(["Accuracy on new questions of all countries, %", *lines])
