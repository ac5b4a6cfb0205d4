"""`loraloom quickstart`: two LoRAs and a mixture, three seeds of each, from nothing to pictures."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from operator import sub
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from pydantic import Field

from loraloom.cli.options import LocalPath
from loraloom.cli.train import raise_failures
from loraloom.config.fields import StrictModel
from loraloom.config.model import Device
from loraloom.config.text import parse_yaml

if TYPE_CHECKING:
    from rich.console import Console

    from loraloom.eval.results import Evaluation
    from loraloom.training.settings import RunConfig

SEEDS = (0, 1, 2)
BASE_STEPS = 4000
PROMPT = "Bus 959 in Gripel goes to the"


class QuickstartOptions(StrictModel):
    """Where results go, and how long it takes."""

    output_dir: LocalPath = Path("quickstart")
    """Write adapters, metrics and pictures to this directory."""
    overwrite: bool = False
    """Replace an earlier quickstart's results."""
    resume: bool = False
    """Go on where an interrupted quickstart was, if there is one."""
    max_steps: int = Field(default=800, ge=1)
    """Train for N steps."""
    device: Device = "auto"
    """auto (an accelerator where there is one), cpu, cuda, cuda:0, xpu, mps."""


def quickstart(
    options: Annotated[QuickstartOptions, Parameter(name="*")] = QuickstartOptions(),
) -> None:
    """Train two LoRAs and a mixture together, three seeds of each, and see which learns more.

    Nothing is downloaded: the data set, `skills@8` (small rules in eight invented lands), and a
    tiny base model that knows its language are made on the spot. Four to seven minutes on
    two slow processor cores.
    """
    output_dir, device = options.output_dir, options.device
    resume, overwrite = options.resume, options.overwrite
    run = _run_config(options.max_steps, output_dir / "adapters", output_dir / "base", device)
    from loraloom.data.tasks import load_question_set
    from loraloom.data.tiny_base import make_tiny_base
    from loraloom.eval.evaluation import EvaluationProgress, evaluate
    from loraloom.models.host import attach
    from loraloom.models.loading import find_device, load_base_model
    from loraloom.terminal import make_console
    from loraloom.training.progress import Progress
    from loraloom.training.run import train
    from loraloom.training.store import RunDirectory

    console = make_console()
    find_device(device)  # one that isn't there is an error now, not minutes later
    RunDirectory(run.output_dir).check(resume=resume, overwrite=overwrite)
    base = Path(run.base_model)
    if base.is_dir():
        console.print(f"Taking the tiny base model in {base}", soft_wrap=True)
    else:
        console.print("Making a tiny base model of three layers (some two minutes)")
        with EvaluationProgress(console) as progress:
            advance = progress.start("base model", [1] * BASE_STEPS, "steps")
            make_tiny_base(base, BASE_STEPS, on_step=lambda step: advance([step]))
    model, tokenizer = load_base_model(run.base_model, device=device)
    host = attach(model)
    names = [job.name for job in run.jobs]
    console.print(f"Training {len(names)} adapters on it, all in the same steps")
    results = train(
        run,
        resume=resume,
        overwrite=overwrite,
        progress=Progress(console),
        base=(host, tokenizer),
        command="loraloom quickstart",
    )
    raise_failures(results)
    for name in names:
        host.load(name, run.output_dir / name)
    questions = load_question_set("skills@8", "text", split="test")
    console.print(f"Asking the base model and all of them {len(questions.questions)} new questions")
    seeds: dict[str, list[str]] = {}
    for name in names:
        seeds.setdefault(name.partition("@")[0], []).append(name)
    *others, mixture = seeds
    pairs = [(mixture, other) for other in others]
    found = evaluate(host, tokenizer, [questions], [None, *names], pairs=pairs)
    _print_accuracies(console, found, seeds)
    sizes = {result.job: result.num_parameters for result in results}
    _print_verdict(console, found, seeds, sizes)
    _draw(output_dir, run.output_dir, seeds, found.routing[names[-1]])
    _print_outlook(console, output_dir, base, run.output_dir / names[-1])


def _run_config(max_steps: int, output_dir: Path, base: Path, device: str) -> RunConfig:
    """Fill the quickstart's run file in, with a job for each seed."""
    file = files("loraloom.cli") / "quickstart.yaml"
    jobs = [
        {**job, "name": f"{job['name']}@{seed}", "seed": seed}
        | {"train": {**job["train"], "max_steps": max_steps}}
        for job in parse_yaml(file.read_text(encoding="utf-8"), "quickstart.yaml")["jobs"]
        for seed in SEEDS
    ]
    return RunConfig.model_validate(
        {"base_model": str(base), "output_dir": output_dir, "device": device, "jobs": jobs}
    )


def _print_accuracies(
    console: Console, found: Evaluation, seeds: Mapping[str, Sequence[str]]
) -> None:
    """Print what the base model and each method answer right, by skill and of all questions."""
    from loraloom.eval.results import BASE
    from loraloom.eval.tables import CONSTANT, MARK, NOTE
    from loraloom.terminal import make_table, print_tables

    (task,) = found.tasks
    in_all: dict[str, Any] = {name: by_task[task] for name, by_task in found.results.items()}
    by_skill = {name: result["groups"] for name, result in in_all.items()}
    table = make_table(
        "skill",
        values=[CONSTANT, "base model", *seeds],
        title=f"Right answers to new questions, %: means of {len(SEEDS)} seeds ± standard error",
    )
    rows = {skill: {n: by_skill[n][skill] for n in by_skill} for skill in by_skill[BASE]}
    for row, of in {**rows, "all": in_all}.items():
        majority = of[BASE]["majority"]
        cells = []
        for members in ([BASE], *seeds.values()):
            shares = [of[name]["accuracy"] for name in members]
            error = f" ± {100 * _stderr(shares):.1f}" if row == "all" and len(shares) > 1 else ""
            cells.append(
                f"{100 * fmean(shares):.1f}{error}{'' if fmean(shares) > majority else MARK}"
            )
        style = "bold" if row == "all" else None
        table.add_row(row, f"{100 * majority:.1f}", *cells, style=style)
    table.caption = NOTE
    console.print()
    print_tables(console, [table])


def _print_verdict(
    console: Console,
    found: Evaluation,
    seeds: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
) -> None:
    """Say how far the mixture, the last method, is from the others, and what that is worth."""
    (task,) = found.tasks
    console.print()
    for one, what in zip(found.comparisons, ("its experts' compute", "its size"), strict=True):
        shares = (
            [found.results[name][task].get("accuracy") or 0.0 for name in seeds[method]]
            for method in (one.first, one.second)
        )
        over_seeds = _stderr([*map(sub, *shares)])
        first, second = (f"{sizes[seeds[method][0]]:,}" for method in (one.first, one.second))
        console.print(
            f"{one.first} ({first} weights) minus {one.second}, the LoRA of {what} ({second}): "
            f"{100 * one.difference:+.1f} points, ± {100 * over_seeds:.1f} over seeds, "
            f"± {100 * (one.stderr or 0):.1f} over questions",
            soft_wrap=True,
        )
    console.print(
        "A difference that isn't well beyond both says nothing. And this is one task on a tiny "
        "model:\ndocs/when_a_mixture.md has where a mixture pays, and how to find out on yours.",
        soft_wrap=True,
    )


def _stderr(values: Sequence[float]) -> float:
    return stdev(values) / math.sqrt(len(values))


def _draw(
    output_dir: Path,
    adapters: Path,
    seeds: Mapping[str, Sequence[str]],
    routing: Mapping[str, Any],
) -> None:
    """Draw each method's training loss, the mean of its seeds, and what a mixture's experts do."""
    from loraloom.eval.plots import plot_experts, plot_loss_curves
    from loraloom.training.tracking import read_curve

    curves = {}
    for method, members in seeds.items():
        by_seed = [read_curve(adapters / name / "metrics.jsonl", "loss") for name in members]
        curves[method] = [
            (points[0][0], fmean(loss for _, loss in points))
            for points in zip(*by_seed, strict=True)
        ]
    plot_loss_curves(curves, output_dir / "loss.png")
    ((_, asked),) = routing["tasks"].items()
    told = routing["specialisation"]
    plot_experts(
        asked["load"],
        {topic.rpartition("/")[2]: bits for topic, bits in told["topics"]["of"].items()},
        {
            "about the skill": told["topics"]["bits"],
            "about the kind of token": told["token_classes"]["bits"],
        },
        output_dir / "experts.png",
        f"What the mixture's experts do (top-{routing['top_k']} of {routing['num_experts']})",
    )


def _print_outlook(console: Console, output_dir: Path, base: Path, adapter: Path) -> None:
    result = shlex.quote(f"{output_dir}/eval.json")
    mix = shlex.quote(f"mix={adapter}")
    model = f"--base-model {shlex.quote(str(base))} --adapter {mix}"
    console.print(
        f"\nAdapters and metrics are in {adapter.parent}/, pictures in {output_dir}/: loss.png, "
        "experts.png\n"
        "\nTry next:\n"
        f"  loraloom inspect {shlex.quote(str(adapter))}\n"
        f'  loraloom generate {model} --raw --prompt "{PROMPT}" --max-new-tokens 4\n'
        f"  loraloom eval {model} --task skills@8 --scoring text --output {result}\n"
        "and on a language model: examples in README.md",
        soft_wrap=True,
    )
