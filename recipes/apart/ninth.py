"""A ninth adapter, added to one model of eight: what it costs, and what becomes of the eight.

    python recipes/apart/ninth.py --base-model runs/mixture/tiny-base \
        --adapters runs/apart/lands/apart --output runs/apart/ninth

Asks the test questions of nine lands: of the model of eight, for which the ninth land is unknown,
and of the one that has the ninth adapter, whose part of the router alone is fitted. Tells how long
this took, and a LoRA anew on the rows of all nine, with four times the training.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import loraloom

LANDS = {f"land{n}": {"task": f"skills@{n}of9", "scoring": "text"} for n in range(1, 10)}
NINTH = "land9"
# The rate, the steps of so many rows, and the rank; those of all nine are lora-4x's of joint.yaml.
ALONE, ANEW = (8e-3, 150, 16, 4), (3e-3, 600, 144, 36)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-model", required=True)
    parser.add_argument(
        "--adapters", type=Path, required=True, help="of the eight, as run.py has them"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args(arguments)
    model, tokenizer = loraloom.load_base_model(args.base_model, dtype="float32")
    base = (loraloom.attach(model), tokenizer)
    found = [add_ninth(args, base, seed) for seed in range(args.seeds)]
    for what in found[0]:
        values = [one[what] for one in found]
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        print(f"{what}: {fmean(values):.1f} ± {error:.1f}")
    joint = {"task": "skills@9", "scoring": "text"}
    print(f"all nine anew: {train(args, base, 'anew', joint, 0, ANEW):.0f} s")


def add_ninth(args: argparse.Namespace, base: Any, seed: int) -> dict[str, float]:
    host, tokenizer = base
    eight = {land: str(args.adapters / f"{land}@{seed}") for land in LANDS if land != NINTH}
    host.add("eight", loraloom.RoutedConfig(experts=eight))
    loraloom.fit_router(host, tokenizer, "eight", {land: LANDS[land] for land in eight})
    name = f"{NINTH}@{seed}"
    seconds = train(args, base, name, LANDS[NINTH], seed, ALONE)
    began = time.monotonic()
    host.add_experts("eight", {NINTH: str(args.output / name)}, name="nine")
    loraloom.fit_router(host, tokenizer, "nine", LANDS, only=[NINTH])
    fitted = time.monotonic()
    before, after = (host.adapters[one].tensors() for one in ("eight", "nine"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    tasks = [source["task"] for source in LANDS.values()]
    names = [None, "eight", "nine"]
    asked = loraloom.evaluate(host, tokenizer, tasks, names, scoring="text", split="test", pairs=[])
    told: dict[str, list[str]] = {}
    for line in asked.lines():
        if line["task"] != LANDS[NINTH]["task"]:
            told.setdefault(line["adapter"], []).append(line["chosen"])
    same = [one == other for one, other in zip(told["eight"], told["nine"], strict=True)]
    of = {
        f"{name}, {what}": 100 * fmean(asked.results[name][task]["accuracy"] for task in part)
        for name in ("base", "eight", "nine")
        for what, part in (("the eight lands", tasks[:-1]), ("the ninth", tasks[-1:]))
    }
    for one in ("eight", "nine"):
        host.remove(one)
    times = {"seconds of its adapter": seconds, "of its part of the router": fitted - began}
    return of | {"same answers to the eight, %": 100 * fmean(same)} | times


def train(
    args: argparse.Namespace, base: Any, name: str, data: Any, seed: int, how: tuple[Any, ...]
) -> float:
    """Train a LoRA, and return the seconds that it took."""
    rate, max_steps, batch_size, rank = how
    job = {
        "name": name,
        "seed": seed,
        "adapter": {"method": "lora", "rank": rank, "alpha": 2 * rank},
        "data": data,
        "train": {
            "learning_rate": rate,
            "lr_scheduler": "cosine",
            "warmup_ratio": 0.1,
            "max_steps": max_steps,
            "batch_size": batch_size,
            "max_length": 64,
        },
    }
    run = {"base_model": args.base_model, "dtype": "float32", "jobs": [job]}
    began = time.monotonic()
    loraloom.train({**run, "output_dir": str(args.output)}, overwrite=True, base=base)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
