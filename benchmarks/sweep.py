"""A sweep trained to its end against the same one with successive halving.

Both are trained one after the other; a run that is interrupted goes on when the same command is
given again. Then the best job of each is measured on the validation split that neither training nor
ranking has seen, row by row, so that their difference has a paired standard error. This is done in
float32: in bfloat16 a loss moves in the third digit with the batch that it is computed in.

    .venv/bin/python benchmarks/sweep.py --data data --output sweep.json
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import yaml

import loraloom

GRID, ASHA = "grid", "asha"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=Path("recipes/sweep.yaml"))
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--directory", type=Path, default=Path("runs/sweep_benchmark"))
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def read_run(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """The recipe, with its early stopping or without."""
    run = yaml.safe_load(arguments.recipe.read_text(encoding="utf-8"))
    run |= {"base_model": arguments.base_model, "output_dir": str(arguments.directory / name)}
    run["sweep"]["job"]["data"]["path"] = str(arguments.data)
    if name == GRID:
        run["sweep"]["early_stopping"] = None
    return run


def train_or_resume(run: dict[str, Any]) -> None:
    directory = Path(run["output_dir"])
    table = directory / "sweep.csv"
    if not table.exists() or "running" in table.read_text(encoding="utf-8"):
        print(f"training {directory}", flush=True)
        loraloom.train(run, resume=(directory / ".checkpoints").exists())


def summary(run: dict[str, Any]) -> dict[str, Any]:
    """What a sweep did and found."""
    with (Path(run["output_dir"]) / "sweep.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    best = next(row for row in rows if row["rank"] == "1")
    metric = run["sweep"].get("metric", "eval/loss")
    return {
        "steps": sum(int(row["steps"]) for row in rows),
        "best": best["name"],
        "parameters": {path: best[path] for path in run["sweep"]["parameters"]},
        metric: float(best[metric]),
    }


def main() -> None:
    arguments = parse_arguments()
    runs = {name: read_run(arguments, name) for name in (GRID, ASHA)}
    for run in runs.values():
        train_or_resume(run)
    report: dict[str, Any] = {name: summary(run) for name, run in runs.items()}
    report["share of steps"] = report[ASHA]["steps"] / report[GRID]["steps"]
    model, tokenizer = loraloom.load_base_model(arguments.base_model, "float32")
    host = loraloom.attach(model)
    for name, run in runs.items():
        host.load(name, Path(run["output_dir"]) / report[name]["best"])
    data = runs[GRID]["sweep"]["job"]["data"]
    asked = {key: data[key] for key in ("task", "path", "scoring")}
    evaluation = loraloom.evaluate_loss(host, tokenizer, asked, [GRID, ASHA], pairs=[(ASHA, GRID)])
    report["validation split"] = evaluation.to_json()
    print({key: value for key, value in report.items() if key != "validation split"})
    for table in evaluation.tables():
        print(table.title, *zip(*(column.cells for column in table.columns), strict=True), sep="\n")
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
