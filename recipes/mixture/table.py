"""Make a table of studies: python recipes/mixture/table.py OUTPUT... > table.md

Each OUTPUT is a directory that `run.py` has filled, or one with several of them. Numbers are means
over seeds with their standard errors; losses are in nats a token of the answer. `--jsonl` prints a
JSON line for each method in place of the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HEADER = (
    "| study | method | weights | rate | right, % | of those learnt | loss | of those learnt "
    "| {first} minus it: right | loss | p over questions |"
)
METRICS = ("accuracy", "train_accuracy", "loss", "train_loss")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("outputs", type=Path, nargs="+")
    parser.add_argument("--jsonl", action="store_true", help="JSON lines")
    args = parser.parse_args()
    studies = list(read_studies(args.outputs))
    if args.jsonl:
        for study in studies:
            print("\n".join(map(json.dumps, lines(study))))
    else:
        print("\n".join(table(studies)))


def read_studies(outputs: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Read the studies in directories, in the order of their names."""
    for output in outputs:
        for path in sorted(output.rglob("result.json")):
            study = json.loads(path.read_text())
            if "methods" in study:  # else it is a job's
                yield study


def lines(study: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Give a record for each method."""
    shared = {name: study[name] for name in ("study", "base_model", "task", "steps", "questions")}
    for name, method in study["methods"].items():
        yield {**shared, "method": name, **method}


def table(studies: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Write a Markdown table."""
    firsts = {one["first"] for study in studies for one in study["comparisons"]}
    yield HEADER.format(first=firsts.pop() if len(firsts) == 1 else "the first")
    yield "|---" * HEADER.count(" | ") + "|---|"
    for study in studies:
        compared = {one["second"]: one for one in study["comparisons"]}
        for name, method in study["methods"].items():
            cells = [study["study"], name, f"{method['parameters']:,}", _rate(method)]
            cells += [_number(metric, method.get(metric)) for metric in METRICS]
            yield f"| {' | '.join([*cells, *_differences(compared.get(name))])} |"
        cells = [study["study"], "base model", "", ""]
        known = {metric: {"mean": mean, "stderr": None} for metric, mean in study["base"].items()}
        cells += [_number(metric, known.get(metric)) for metric in METRICS]
        yield f"| {' | '.join([*cells, *_differences(None)])} |"


def _rate(method: dict[str, Any]) -> str:
    """The rate; marked where it is the first or the last that was tried."""
    return f"{method['rate']:g}{' (edge)' if method['at_edge'] else ''}"


def _number(metric: str, value: dict[str, Any] | None, sign: str = "") -> str:
    if value is None:  # was not asked for
        return ""
    factor, digits = (1, 3) if metric.endswith("loss") else (100, 1)
    mean, error = value["mean"] * factor, value["stderr"]
    return f"{mean:{sign}.{digits}f}" + ("" if error is None else f" ± {error * factor:.{digits}f}")


def _differences(compared: dict[str, Any] | None) -> list[str]:
    if compared is None:
        return ["", "", ""]
    over_seeds, p_value = compared["over_seeds"], compared["over_questions"]["adjusted_p_value"]
    return [
        _number("accuracy", over_seeds.get("accuracy"), "+"),
        _number("loss", over_seeds["loss"], "+"),
        "< 0.001" if p_value < 0.001 else f"{p_value:.3f}",
    ]


if __name__ == "__main__":
    main()
