"""Make the seed table at a small scale: search learning rates, train three seeds, score them.

    python recipes/small/run.py [--data DIR] [--output DIR] [--limit 400] [--full]

Each part is one `loraloom` command, printed before it runs. What is done is not done again, what
was interrupted goes on: run it again after Ctrl-C or a crash.

1. Learning rates: each method takes 19 steps (about 300 rows) with each of five, seed 100. The
   lowest loss on examples held out from the training data chooses; no question is looked at.
2. Three seeds of all four methods, trained together in one process.
3. The first 400 questions of each task for all twelve adapters and the base model, with paired
   comparisons; --full: all questions, for the adapters of seed 0.
4. One page of it all: report.html.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).with_name("seed_table.yaml")
METHODS = ("lora", "dora", "mixlora", "mixdora")
LEARNING_RATES = ("2e-4", "5e-4", "1e-3", "2e-3", "4e-3")
SEARCH_SEED, SEARCH_STEPS = 100, 19
SEEDS = (0, 1, 2)
TASKS = "arc_easy,arc_challenge,boolq,openbookqa,piqa"
COMPARISONS = ("lora", "dora", "mixdora")  # each with mixlora


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="directory of the data sets"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/small"))
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--limit", type=int, default=400, help="questions of each task")
    parser.add_argument("--full", action="store_true", help="score seed 0 on all questions too")
    args = parser.parse_args()
    learning_rates = search(args)
    print("learning rates:", learning_rates, flush=True)
    for seed in SEEDS:
        train(args, args.output / f"seed{seed}", seed, learning_rates)
    evaluate(args, SEEDS, args.output / f"first{args.limit}", "--limit", str(args.limit))
    if args.full:
        evaluate(args, SEEDS[:1], args.output / "full")
    directories = [args.output / f"seed{seed}" for seed in SEEDS]
    results = [f"--eval={path}" for path in sorted(args.output.glob("*.json"))]
    run("report", *directories, *results, f"--output={args.output}/report.html")


def search(args: argparse.Namespace) -> dict[str, str]:
    """Return each method's learning rate: that of the lowest loss on held-out examples."""
    losses: dict[str, dict[str, float]] = {method: {} for method in METHODS}
    for rate in LEARNING_RATES:
        directory = args.output / f"search-{rate}"
        train(args, directory, SEARCH_SEED, dict.fromkeys(METHODS, rate), SEARCH_STEPS)
        for method in METHODS:
            losses[method][rate] = read_result(directory, method)["metrics"]["eval/loss"]
    table = {
        method: dict(sorted(by_rate.items(), key=lambda pair: pair[1]))
        for method, by_rate in losses.items()
    }
    print(json.dumps(table, indent=2), flush=True)
    return {method: next(iter(by_rate)) for method, by_rate in table.items()}


def train(
    args: argparse.Namespace,
    directory: Path,
    seed: int,
    learning_rates: dict[str, str],
    max_steps: int | None = None,
) -> None:
    if all((directory / method / "result.json").exists() for method in METHODS):
        return
    settings = {"base_model": args.base_model, "output_dir": directory}
    for index, method in enumerate(METHODS):
        settings[f"jobs.{index}.seed"] = seed
        settings[f"jobs.{index}.train.learning_rate"] = learning_rates[method]
        for source in range(len(TASKS.split(","))):
            settings[f"jobs.{index}.data.mix.{source}.path"] = args.data
        if max_steps is not None:
            settings[f"jobs.{index}.train.max_steps"] = max_steps
            settings[f"jobs.{index}.train.num_epochs"] = "null"
    resume = ["--resume"] if (directory / ".checkpoints").exists() else []
    run("train", RECIPE, *resume, *(f"--set={path}={value}" for path, value in settings.items()))


def evaluate(args: argparse.Namespace, seeds: tuple[int, ...], output: Path, *more: str) -> None:
    if output.with_suffix(".json").exists():
        return
    adapters = [
        f"--adapter={method if len(seeds) == 1 else f'{method}@{seed}'}"
        f"={args.output}/seed{seed}/{method}"
        for method in METHODS
        for seed in seeds
    ]
    outputs = [f"--output={output}{suffix}" for suffix in (".json", ".md", ".csv")]
    pairs = [f"--compare=mixlora:{method}" for method in COMPARISONS]
    pairs += [f"--compare={method}:base" for method in METHODS]
    outputs.append(f"--per-question={output}.jsonl")
    what = [f"--base-model={args.base_model}", f"--task={TASKS}", f"--data={args.data}"]
    run("eval", *what, "--scoring=text", "--dtype=bfloat16", *adapters, *pairs, *outputs, *more)


def read_result(directory: Path, method: str) -> dict:
    return json.loads((directory / method / "result.json").read_text())


def run(*command: object) -> None:
    arguments = ["loraloom", *map(str, command)]
    print("$", shlex.join(arguments), flush=True)
    program = Path(sys.executable).with_name("loraloom")
    subprocess.run([str(program), *arguments[1:]], check=True)


if __name__ == "__main__":
    main()
