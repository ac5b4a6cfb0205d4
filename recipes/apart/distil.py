"""The model of a router by prompt as one LoRA, which learns its answers in place of labels.

    python recipes/apart/distil.py --base-model runs/mixture/tiny-base \
        --adapters runs/apart/lands/apart --joint runs/apart/joint --output runs/apart/distil

The routed model of run.py's eight adapters answers the training questions of all lands (the choice
that it scores highest); a LoRA of rank 32 learns these answers, at the rates of joint.yaml's LoRAs
that learnt the labels. All are asked the test questions. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from string import ascii_uppercase
from typing import Any

import loraloom
from loraloom.data.skills import generate_skills, land_names

LANDS = {f"land{n}": {"task": f"skills@{n}of8", "scoring": "text"} for n in range(1, 9)}
# Steps of 128 rows and the rate: that of the labels' LoRA, by validation loss.
RUNS = {"lora": (150, 6e-3), "lora-4x": (600, 3e-3)}
TASK = """\
data: {files: {train: train.jsonl}}
template: "{{ question }}"
choices: choices
answer: answer
answer_is: index
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--adapters", type=Path, required=True, help="of run.py")
    parser.add_argument("--joint", type=Path, required=True, help="a study of joint.yaml")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--runs", type=lambda names: names.split(","), default=[*RUNS], help="of RUNS"
    )
    args = parser.parse_args(arguments)
    model, tokenizer = loraloom.load_base_model(args.base_model, dtype="float32")
    base, seeds = (loraloom.attach(model), tokenizer), range(args.seeds)
    told = [fmean(tell(args, base, seed)) for seed in seeds]
    print(f"training questions that the routed model has right: {_mean(told)} %")
    for name in args.runs:
        done = args.output / name / f"done-{args.seeds}"
        if not done.exists():
            jobs = [job_of(args, name, seed) for seed in seeds]
            run = {"base_model": args.base_model, "dtype": "float32", "jobs": jobs}
            run["output_dir"] = str(args.output / name)
            loraloom.train(run, overwrite=True, base=base)
            done.touch()
    found = [ask(args, base, seed) for seed in seeds]
    for name in found[0]:
        below = [one["prompt"] - one[name] for one in found]
        print(f"{name}: {_mean([one[name] for one in found])}, below the routed: {_mean(below)}")


def tell(args: argparse.Namespace, base: Any, seed: int) -> list[float]:
    """Write the training questions with the routed model's answers; tell which are right."""
    host, tokenizer = base
    path = args.output / "told" / str(seed) / "train.jsonl"
    rows = generate_skills("train", land_names(len(LANDS)))
    if not path.exists():
        add_routed(args, base, seed)
        asked = {"scoring": "text", "split": "train", "pairs": []}
        found = loraloom.evaluate(host, tokenizer, f"skills@{len(LANDS)}", ["prompt"], **asked)
        host.remove("prompt")
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "told.yaml").write_text(TASK)
        answers = [
            {**row, "answer": ascii_uppercase.index(line["chosen"])}
            for row, line in zip(rows, found.lines(), strict=True)
        ]
        path.write_text("\n".join(map(json.dumps, answers)) + "\n")
    answers = [json.loads(line)["answer"] for line in path.read_text().splitlines()]
    return [100.0 * (row["answer"] == one) for row, one in zip(rows, answers, strict=True)]


def add_routed(args: argparse.Namespace, base: Any, seed: int) -> None:
    host, tokenizer = base
    experts = {land: str(args.adapters / f"{land}@{seed}") for land in LANDS}
    host.add("prompt", loraloom.RoutedConfig(experts=experts))
    loraloom.fit_router(host, tokenizer, "prompt", LANDS, limit=200)


def job_of(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    max_steps, rate = RUNS[name]
    return {
        "name": f"{name}@{seed}",
        "seed": seed,
        "adapter": {"method": "lora", "rank": 32, "alpha": 64},
        "data": {"task": str(args.output / "told" / str(seed) / "told.yaml"), "scoring": "text"},
        "train": {
            "learning_rate": rate,
            "lr_scheduler": "cosine",
            "warmup_ratio": 0.1,
            "max_steps": max_steps,
            "batch_size": 128,
            "max_length": 64,
        },
    }


def ask(args: argparse.Namespace, base: Any, seed: int) -> dict[str, float]:
    """Ask the test questions of the routed model, the LoRAs of its answers and of labels."""
    host, tokenizer = base
    add_routed(args, base, seed)
    names = ["prompt"]
    for name in args.runs:
        host.load(f"{name}-labels", args.joint / "seeds" / f"{name}@{seed}")
        host.load(f"{name}-answers", args.output / name / f"{name}@{seed}")
        names += [f"{name}-labels", f"{name}-answers"]
    asked = {"scoring": "text", "split": "test", "pairs": []}
    found = loraloom.evaluate(host, tokenizer, f"skills@{len(LANDS)}", names, **asked)
    for name in names:
        host.remove(name)
    return {
        name: 100 * of[f"skills@{len(LANDS)}"]["accuracy"] for name, of in found.results.items()
    }


def _mean(values: Sequence[float]) -> str:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{fmean(values):.1f} ± {error:.1f}"


if __name__ == "__main__":
    main()
