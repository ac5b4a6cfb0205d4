"""`loraloom quickstart`: two adapters on a small model, from nothing to pictures, in minutes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loraloom.cli.options import BaseModelOption, DeviceOption, DtypeOption
from loraloom.cli.train import raise_failures
from loraloom.config.run import RunConfig
from loraloom.config.yaml_text import parse_yaml
from loraloom.models.sources import SMALL_MODEL

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

    from loraloom.config.job import JobConfig
    from loraloom.data.examples import ChoiceQuestion
    from loraloom.models.host import Host


def quickstart(
    output_dir: Annotated[
        Path, typer.Option("--output-dir", help="Where adapters, metrics and pictures go.")
    ] = Path("quickstart"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier quickstart's results.")
    ] = False,
    max_steps: Annotated[int, typer.Option("--max-steps", min=1, help="Training steps.")] = 180,
    base_model: BaseModelOption = SMALL_MODEL,
    dtype: DtypeOption = "bfloat16",
    device: DeviceOption = "auto",
) -> None:
    """Train a plain adapter and a mixture together on a small model, and see what they learnt.

    The data set, `skills`, is made by loraloom itself: small rules of invented worlds. About six
    minutes on two processor cores.
    """
    run = _run_config(output_dir, max_steps, base_model, dtype, device)
    from rich.console import Console

    from loraloom.data.questions import load_questions
    from loraloom.models.attach import attach
    from loraloom.models.loading import load_base_model
    from loraloom.training.run.outputs import RunDirectory
    from loraloom.training.run.progress import Progress
    from loraloom.training.run.run import train

    console = Console()
    RunDirectory(run.output_dir).check(resume=False, overwrite=overwrite)
    questions = load_questions("skills", "text", split="test")
    console.print(f"Loading {base_model} ({dtype})")
    model, tokenizer = load_base_model(base_model, dtype, device)
    host = attach(model)
    console.print(f"Scoring the base model on {len(questions)} held-out questions")
    before = _accuracies(host, tokenizer, questions, [None])
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
    after = _accuracies(host, tokenizer, questions, names)
    _print_accuracies(console, before | after)
    mixture = next(job for job in run.jobs if job.adapter.experts_per_token is not None)
    _draw(host, tokenizer, questions, output_dir, names, mixture)
    _print_outlook(console, output_dir / mixture.name, base_model)


def _run_config(
    output_dir: Path, max_steps: int, base_model: str, dtype: str, device: str
) -> RunConfig:
    """Fill the quickstart's run file in."""
    file = files("loraloom.cli") / "quickstart.yaml"
    settings = parse_yaml(file.read_text(encoding="utf-8"), "quickstart.yaml")
    for job in settings["jobs"]:
        job["train"]["max_steps"] = max_steps
    own = {"base_model": base_model, "dtype": dtype, "device": device, "output_dir": output_dir}
    return RunConfig.model_validate(settings | own)


def _accuracies(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChoiceQuestion],
    adapters: Sequence[str | None],
) -> dict[str | None, dict[str, float]]:
    """Return each adapter's accuracy by skill, and `average` over all questions."""
    from loraloom.eval.accuracy import accuracy, accuracy_by_group
    from loraloom.eval.protocol import score_questions

    scores = score_questions(host, tokenizer, list(questions), adapters)
    return {
        name: {
            **{skill: one.accuracy for skill, one in accuracy_by_group(scores[name]).items()},
            "average": accuracy(scores[name]).accuracy,
        }
        for name in adapters
    }


def _print_accuracies(
    console: Console, accuracies: Mapping[str | None, Mapping[str, float]]
) -> None:
    from rich.table import Table

    names = [name or "base model" for name in accuracies]
    table = Table("skill", *names, box=None)
    for skill in accuracies[None]:
        cells = [f"{100 * by_skill[skill]:.1f}" for by_skill in accuracies.values()]
        table.add_row(skill, *cells, style="bold" if skill == "average" else None)
    console.print("\nAccuracy on held-out questions, %")
    console.print(table)


def _draw(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[ChoiceQuestion],
    output_dir: Path,
    names: Sequence[str],
    mixture: JobConfig,
) -> None:
    from loraloom.eval.plots import plot_expert_load, plot_loss_curves
    from loraloom.eval.routing import tokens_per_expert
    from loraloom.routing.statistics import load_shares
    from loraloom.training.run.tracking import read_curve

    curves = {name: read_curve(output_dir / name / "metrics.jsonl", "loss") for name in names}
    plot_loss_curves(curves, output_dir / "loss.png")
    texts: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        texts[question.group or "all"].append(
            question.contexts[question.gold] + question.continuations[question.gold]
        )
    counts = tokens_per_expert(host, tokenizer, mixture.name, texts)
    plot_expert_load(
        load_shares(sum(counts.values())).tolist(),  # pyright: ignore[reportArgumentType]
        {skill: load_shares(count.sum(0)).tolist() for skill, count in counts.items()},
        output_dir / "expert_load.png",
        f"Where the mixture sends its tokens (top-{mixture.adapter.experts_per_token} of "
        f"{mixture.adapter.experts_per_router} experts)",
    )


def _print_outlook(console: Console, adapter: Path, base_model: str) -> None:
    output_dir = adapter.parent
    console.print(
        f"\nAdapters and metrics are in {output_dir}/, with pictures: loss.png, expert_load.png\n"
        "\nTry next:\n"
        f"  loraloom inspect {adapter}\n"
        f"  loraloom generate --base-model {base_model} --adapter mix={adapter} "
        '--raw --prompt "Bus 34 in Orlen goes to the" --max-new-tokens 4\n'
        f"  loraloom eval --base-model {base_model} --adapter mix={adapter} "
        f"--task skills --scoring text --output {output_dir}/eval.json",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
