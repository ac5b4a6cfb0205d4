"""`loraloom quickstart`: two adapters on a small model, from nothing to pictures, in minutes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraloom.cli.options import (
    BaseModelOption,
    DeviceOption,
    DtypeOption,
    QuantizationOption,
    path_option,
)
from loraloom.cli.train import raise_failures
from loraloom.config.quantization import quantization_option
from loraloom.config.run import RunConfig
from loraloom.config.yaml_text import parse_yaml
from loraloom.models.sources import SMALL_MODEL

if TYPE_CHECKING:
    from rich.console import Console

    from loraloom.data.questions import QuestionSet
    from loraloom.eval.results import TaskScores


def quickstart(
    output_dir: Annotated[
        Path,
        path_option("--output-dir", metavar="DIR", help="Where adapters, metrics and pictures go."),
    ] = Path("quickstart"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier quickstart's results.")
    ] = False,
    max_steps: Annotated[int, typer.Option("--max-steps", min=1, help="Training steps.")] = 180,
    base_model: BaseModelOption = SMALL_MODEL,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "auto",
    quantization: QuantizationOption = None,
) -> None:
    """Train a plain adapter and a mixture together on a small model, and see what they learnt.

    The data set, `skills`, is made by loraloom itself: small rules of invented worlds. About six
    minutes on two processor cores.
    """
    run = _run_config(
        max_steps,
        output_dir=output_dir,
        base_model=base_model,
        dtype=dtype,
        device=device,
        quantization=quantization,
    )
    from loraloom.eval.evaluation import evaluate
    from loraloom.models.attach import attach
    from loraloom.models.loading import load_base_model
    from loraloom.terminal import make_console
    from loraloom.training.run.outputs import RunDirectory
    from loraloom.training.run.progress import Progress
    from loraloom.training.run.run import train

    console = make_console()
    RunDirectory(run.output_dir).check(resume=False, overwrite=overwrite)
    skills = _load_skills()
    console.print(f"Loading {base_model} ({dtype})")
    model, tokenizer = load_base_model(base_model, dtype, device, quantization=quantization)
    host = attach(model)
    num_questions = sum(len(skill.questions) for skill in skills)
    console.print(f"Scoring the base model on {num_questions} held-out questions")
    before = evaluate(host, tokenizer, skills, [None])
    results = train(
        run,
        overwrite=overwrite,
        progress=Progress(console),
        base=(host, tokenizer),
        command="loraloom quickstart",
    )
    raise_failures(results)
    names = [job.name for job in run.jobs]
    for name in names:
        host.load(name, output_dir / name)
    console.print("Scoring both adapters on the same questions")
    after = evaluate(host, tokenizer, skills, names)
    _print_accuracies(console, before.results | after.results)
    _print_verdict(console, after.tasks, names)
    ((mixture, routing),) = after.details["routing"].items()
    _draw(output_dir, names, routing)
    base = f"--base-model {base_model} {quantization_option(quantization)}".rstrip()
    _print_outlook(console, output_dir / mixture, base)


def _run_config(max_steps: int, **settings: Any) -> RunConfig:
    """Fill the quickstart's run file in."""
    file = files("loraloom.cli") / "quickstart.yaml"
    run = parse_yaml(file.read_text(encoding="utf-8"), "quickstart.yaml")
    for job in run["jobs"]:
        job["train"]["max_steps"] = max_steps
    return RunConfig.model_validate(run | settings)


def _load_skills() -> list[QuestionSet]:
    """The held-out questions, each skill a task of its own."""
    from loraloom.data.questions import load_question_set

    loaded = load_question_set("skills", "text", split="test")
    questions = sorted(loaded.questions, key=lambda question: question.group or "")
    return [
        replace(loaded, task=skill, questions=list(of_skill))
        for skill, of_skill in groupby(questions, key=lambda question: question.group or "")
    ]


def _print_accuracies(console: Console, results: Mapping[str, Mapping[str, Any]]) -> None:
    from loraloom.eval.tables import CONSTANT, MARK, NOTE
    from loraloom.terminal import make_table, print_tables

    titles = [CONSTANT, "base model", *list(results)[1:]]
    table = make_table("skill", values=titles, title="Accuracy on held-out questions, %")
    for skill, of_base in results["base"].items():
        cells = [
            f"{100 * of[skill]['accuracy']:.1f}{'' if of[skill]['beats_majority'] else MARK}"
            for of in results.values()
        ]
        table.add_row(skill, f"{100 * of_base['majority']:.1f}", *cells)
    averages = (_average_accuracy(by_skill) for by_skill in results.values())
    table.add_row("average", "", *(f"{100 * average:.1f}" for average in averages), style="bold")
    table.caption = NOTE
    console.print()
    print_tables(console, [table])


def _print_verdict(console: Console, tasks: Sequence[TaskScores], names: Sequence[str]) -> None:
    """Say what the difference between the two adapters is worth."""
    from loraloom.eval.statistics import compare_paired

    lora, mixture = (
        [float(score.correct) for task in tasks for score in task.scores[name]] for name in names
    )
    found = compare_paired(mixture, lora)
    console.print(
        f"\n{names[1]} minus {names[0]}: {100 * found.difference:+.1f} ± "
        f"{100 * (found.stderr or 0):.1f} points on the same questions (p = {found.p_value:.2g}).\n"
        "That is about these two adapters. Other seeds move either of them by several points, so "
        "it ranks no methods:\ndocs/when_a_mixture.md says where a mixture pays, from several "
        "seeds each.",
        soft_wrap=True,
        highlight=False,
    )


def _average_accuracy(by_skill: Mapping[str, Any]) -> float:
    """The accuracy over the questions of all skills."""
    results = by_skill.values()
    return fmean(
        [result["accuracy"] for result in results], [result["num_examples"] for result in results]
    )


def _draw(output_dir: Path, names: Sequence[str], routing: Mapping[str, Any]) -> None:
    """Draw the training losses, and what the mixture's experts do."""
    import numpy as np

    from loraloom.eval.plots import plot_experts, plot_loss_curves
    from loraloom.training.run.tracking import read_curve

    curves = {name: read_curve(output_dir / name / "metrics.jsonl", "loss") for name in names}
    plot_loss_curves(curves, output_dir / "loss.png")
    skills = routing["tasks"]
    loads = np.array([skill["load"] for skill in skills.values()])  # (skill, layer, expert)
    num_tokens = [skill["num_tokens"] for skill in skills.values()]
    told = routing["specialisation"]
    plot_experts(
        np.average(loads, axis=0, weights=num_tokens).tolist(),
        told["topics"]["of"],
        {
            "about the skill": told["topics"]["bits"],
            "about the kind of token": told["token_classes"]["bits"],
        },
        output_dir / "experts.png",
        f"What the mixture's experts do (top-{routing['top_k']} of {routing['num_experts']})",
    )


def _print_outlook(console: Console, adapter: Path, base: str) -> None:
    output_dir = adapter.parent
    console.print(
        f"\nAdapters and metrics are in {output_dir}/, with pictures: loss.png, experts.png\n"
        "\nTry next:\n"
        f"  loraloom inspect {adapter}\n"
        f"  loraloom generate {base} --adapter mix={adapter} "
        '--raw --prompt "Bus 34 in Orlen goes to the" --max-new-tokens 4\n'
        f"  loraloom eval {base} --adapter mix={adapter} "
        f"--task skills --scoring text --output {output_dir}/eval.json",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
