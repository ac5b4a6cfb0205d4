"""`loraloom quickstart`: two LoRAs and a mixture, three seeds of each, from nothing to a page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from operator import sub
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

from cyclopts import Parameter, validators

from loraloom.cli.options import BASE
from loraloom.cli.train import raise_failures
from loraloom.config.fields import checked
from loraloom.config.text import parse_yaml
from loraloom.data import tiny_base
from loraloom.data.tasks import load_question_set
from loraloom.durable import write_output
from loraloom.eval.evaluation import evaluate
from loraloom.eval.results import Evaluation
from loraloom.models.host import attach
from loraloom.models.loading import find_device, load_base_model
from loraloom.report.page import make_page
from loraloom.terminal import make_console, show_progress
from loraloom.training.progress import Progress
from loraloom.training.run import train
from loraloom.training.settings import RunConfig
from loraloom.training.store import RunDirectory

SEEDS = (0, 1, 2)
BASE_STEPS = 4000
TASK = "skills@8"
CAUTION = """\
A difference that isn't well beyond both says nothing. And this is one task on a tiny model:
docs/when_a_mixture.md has where a mixture pays, and how to find out on yours."""


def quickstart(
    *,
    output_dir: Path = Path("quickstart"),
    overwrite: bool = False,
    resume: bool = False,
    max_steps: Annotated[int, Parameter(validator=validators.Number(gte=1))] = 800,
    device: str = "auto",
) -> None:
    """Train two LoRAs and a mixture together, three seeds of each, and see which learns more.

    Nothing is downloaded: the data set, `skills@8` (small rules in eight invented lands), and a
    tiny base model that knows its language are made on the spot. Four to seven minutes on
    two slow processor cores.

    Args:
        output_dir: Write adapters, metrics and a page of results to this directory.
        overwrite: Replace an earlier quickstart's results.
        resume: Resume an interrupted quickstart.
        max_steps: Train for N steps.
        device: auto (an accelerator where there is one), cpu, cuda, cuda:0, xpu, mps.
    """
    console = make_console(soft_wrap=True)
    find_device(device)  # one that isn't there is an error now, not minutes later
    run = _run_config(output_dir, max_steps, device)
    RunDirectory(run.output_dir).check(resume=resume, overwrite=overwrite)
    base = Path(run.base_model)
    if base.is_dir():
        console.print(f"Taking the tiny base model in {base}")
    else:
        console.print("Making a tiny base model of three layers (some two minutes)")
        with show_progress(console, "base model", [1] * BASE_STEPS) as advance:
            tiny_base.make_tiny_base(base, BASE_STEPS, on_step=lambda step: advance([step]))
    model, tokenizer = load_base_model(run.base_model, device=device)
    host = attach(model)
    names = [job.name for job in run.jobs]
    console.print(f"Training {len(names)} adapters on it, all in the same steps")
    progress, base_model = Progress(make_console()), (host, tokenizer)
    results = train(run, resume=resume, overwrite=overwrite, progress=progress, base=base_model)
    raise_failures(results)
    for name in names:
        host.load(name, run.output_dir / name)
    questions = load_question_set(TASK, "text", split="test")
    console.print(f"Asking the base model and all of them {len(questions.questions)} new questions")
    seeds: dict[str, list[str]] = {}
    for name in names:
        seeds.setdefault(name.partition("@")[0], []).append(name)
    *others, mixture = seeds
    pairs = [(mixture, other) for other in others]
    found = evaluate(host, tokenizer, [questions], [None, *names], pairs=pairs)
    sizes = {result.job.partition("@")[0]: result.num_parameters for result in results}
    console.print(_findings(found, seeds, sizes))
    found.write(output_dir / "eval.json")
    page = make_page([run.output_dir], [output_dir / "eval.json"])
    write_output(output_dir / "report.html", page)
    console.print(f"\nAdapters are in {run.output_dir}, a page in {output_dir}/report.html")


def _run_config(output: Path, max_steps: int, device: str) -> RunConfig:
    # the file says what a person would write; seeds, steps and places are filled in
    file = files("loraloom.cli") / "quickstart.yaml"
    run = parse_yaml(file.read_text(encoding="utf-8"), "quickstart.yaml")
    run |= {"base_model": str(output / "base"), "output_dir": output / "adapters", "device": device}
    run["jobs"] = [
        {**job, "name": f"{job['name']}@{seed}", "seed": seed}
        | {"train": {**job["train"], "max_steps": max_steps}}
        for job in run["jobs"]
        for seed in SEEDS
    ]
    return checked(RunConfig, run)


def _findings(
    found: Evaluation, methods: Mapping[str, Sequence[str]], sizes: Mapping[str, int]
) -> str:
    """What is answered right, how far the last method is from others, and what that is worth."""
    results = {name: by_task[TASK] for name, by_task in found.results.items()}
    shares = {
        method: [100 * (results[name].get("accuracy") or 0) for name in names]
        for method, names in {BASE: [BASE], **methods}.items()
    }
    constant = 100 * (results[BASE].get("majority") or 0)
    lines = [
        f"\nRight answers, %: means of {len(SEEDS)} seeds ± standard error",
        f"  {'constant answer':34}{constant:5.1f}",
        f"  {'base model':34}{shares[BASE][0]:5.1f}",
    ]
    for method in methods:
        label = f"{method}, {sizes[method]:,} weights"
        lines.append(f"  {label:34}{fmean(shares[method]):5.1f} ± {_stderr(shares[method]):.1f}")
    for one in found.comparisons:
        over_seeds = _stderr([*map(sub, shares[one.first], shares[one.second])])
        lines.append(
            f"{one.first} minus {one.second}: {100 * one.difference:+.1f} points, "
            f"± {over_seeds:.1f} over seeds, ± {100 * (one.stderr or 0):.1f} over questions"
        )
    return "\n".join([*lines, CAUTION])


def _stderr(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values))
