"""Make the seed table at a small scale: search learning rates, train five seeds, score them.

    python recipes/small/run.py [--data DIR] [--output DIR] [--limit 400] [--full]

Each part is one `loraloom` command, printed before it runs. What is done is not done again, what
was interrupted goes on: run it again after Ctrl-C or a crash.

1. Learning rates: each method trains to the end with each of them, seed 100. The lowest loss on
   examples held out from the training data chooses; no question is looked at.
2. Five seeds of all methods, trained together in one process.
3. The first 400 questions of each task for all adapters and the base model, with paired
   comparisons; --full: all questions, for the adapters of the first seed.
4. One page of it all: report.html.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

RECIPE = Path(__file__).with_name("seed_table.yaml")
JOBS = [job["name"] for job in yaml.safe_load(RECIPE.read_text())["jobs"]]
SEARCH_SEED = 100
TASKS = "arc_easy,arc_challenge,boolq,openbookqa,piqa"
ROWS = 300
"""Of each task in an epoch, by the run file's weights."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("data"), help="directory of the data sets")
    add("--output", type=Path, default=Path("runs/small"))
    add("--base-model", default="smollm2-135m")
    add("--methods", type=_words, default=JOBS, help="mixlora and others of the run file")
    add("--rates", type=_words, default=["5e-4", "1e-3", "2e-3", "4e-3"])
    add("--seeds", type=_words, default=["0", "1", "2", "3", "4"])
    add("--rows", type=int, default=ROWS, help="of each task to learn from")
    add("--limit", type=int, default=400, help="questions of each task")
    add("--full", action="store_true", help="score the first seed on all questions too")
    args = parser.parse_args()
    if "mixlora" not in args.methods or not {*args.methods} <= {*JOBS}:
        raise SystemExit(
            f"--methods must be mixlora and others of {', '.join(JOBS)}, "
            f"got {', '.join(args.methods)}"
        )
    learning_rates = search(args)
    print("learning rates:", learning_rates, flush=True)
    for seed in args.seeds:
        train(args, args.output / f"seed{seed}", seed, learning_rates)
    evaluate(args, args.seeds, args.output / f"first{args.limit}", "--limit", str(args.limit))
    if args.full:
        evaluate(args, args.seeds[:1], args.output / "full")
    directories = [args.output / f"seed{seed}" for seed in args.seeds]
    results = [f"--eval={path}" for path in sorted(args.output.glob("*.json"))]
    run("report", *directories, *results, f"--output={args.output}/report.html")


def _words(text: str) -> list[str]:
    return text.split(",")


def search(args: argparse.Namespace) -> dict[str, str]:
    """Return each method's learning rate: that of the lowest loss on held-out examples."""
    losses: dict[str, dict[str, float]] = {method: {} for method in args.methods}
    for rate in args.rates:
        directory = args.output / f"search-{rate}"
        train(args, directory, SEARCH_SEED, dict.fromkeys(args.methods, rate))
        for method in args.methods:
            losses[method][rate] = read_result(directory, method)["metrics"]["eval/loss"]
    table = {
        method: dict(sorted(by_rate.items(), key=lambda pair: pair[1]))
        for method, by_rate in losses.items()
    }
    print(json.dumps(table, indent=2), flush=True)
    return {method: next(iter(by_rate)) for method, by_rate in table.items()}


def train(
    args: argparse.Namespace, directory: Path, seed: int | str, learning_rates: dict[str, str]
) -> None:
    if all((directory / method / "result.json").exists() for method in args.methods):
        return
    settings = yaml.safe_load(RECIPE.read_text())
    settings |= {"base_model": args.base_model, "output_dir": str(directory)}
    settings["jobs"] = [job for job in settings["jobs"] if job["name"] in args.methods]
    for job in settings["jobs"]:
        train = job["train"] | {"learning_rate": float(learning_rates[job["name"]])}
        sources = [
            source | {"path": str(args.data), "weight": source["weight"] * args.rows / ROWS}
            for source in job["data"]["mix"]
        ]
        job |= {"seed": int(seed), "train": train, "data": job["data"] | {"mix": sources}}
    args.output.mkdir(parents=True, exist_ok=True)
    run_file = directory.with_suffix(".yaml")
    run_file.write_text(yaml.safe_dump(settings, sort_keys=False))
    resume = ["--resume"] if (directory / ".checkpoints").exists() else []
    run("train", run_file, *resume)


def evaluate(args: argparse.Namespace, seeds: list[str], output: Path, *more: str) -> None:
    if output.with_suffix(".json").exists():
        return
    adapters = [
        f"--adapter={method if len(seeds) == 1 else f'{method}@{seed}'}"
        f"={args.output}/seed{seed}/{method}"
        for method in args.methods
        for seed in seeds
    ]
    outputs = [f"--output={output}{suffix}" for suffix in (".json", ".csv")]
    others = [method for method in args.methods if method != "mixlora"]
    pairs = [f"--compare=mixlora:{method}" for method in others]
    pairs += [f"--compare={method}:base" for method in args.methods]
    outputs.append(f"--per-question={output}.jsonl")
    what = [f"--base-model={args.base_model}", f"--task={TASKS}", f"--data={args.data}"]
    run("eval", *what, "--scoring=text", *adapters, *pairs, *outputs, *more)


def read_result(directory: Path, method: str) -> dict:
    return json.loads((directory / method / "result.json").read_text())


def run(*command: object) -> None:
    arguments = ["loraloom", *map(str, command)]
    print("$", shlex.join(arguments), flush=True)
    program = Path(sys.executable).with_name("loraloom")
    subprocess.run([str(program), *arguments[1:]], check=True)


if __name__ == "__main__":
    main()
