"""A ninth adapter, added to one model of eight: what it costs, and what becomes of the eight.

    python recipes/apart/ninth.py --base-model runs/mixture/tiny-base \
        --adapters runs/apart/lands/apart --output runs/apart/ninth

Asks the test questions of nine lands: of the model of eight, for which the ninth land is unknown,
and of the one that has the ninth adapter, whose part of the router alone is fitted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import loraloom

LANDS = {f"land{n}": {"task": f"skills@{n}of9", "scoring": "text"} for n in range(1, 10)}
NINTH = "land9"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-model", required=True)
    parser.add_argument(
        "--adapters", type=Path, required=True, help="of the eight, as run.py has them"
    )
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(arguments)
    model, tokenizer = loraloom.load_base_model(args.base_model, dtype="float32")
    host = loraloom.attach(model)
    eight = {land: str(args.adapters / f"{land}@0") for land in LANDS if land != NINTH}
    host.add("eight", loraloom.RoutedConfig(experts=eight))
    sources = {land: LANDS[land] for land in eight}
    loraloom.fit_router(host, tokenizer, "eight", sources)
    began = time.monotonic()
    train(args, (host, tokenizer))
    trained = time.monotonic()
    host.add_experts("eight", {NINTH: str(args.output / NINTH)}, name="nine")
    loraloom.fit_router(host, tokenizer, "nine", LANDS, only=[NINTH])
    fitted = time.monotonic()
    before, after = host.adapters["eight"].tensors(), host.adapters["nine"].tensors()
    same = all(torch.equal(after[name], tensor) for name, tensor in before.items())
    tasks = [source["task"] for source in LANDS.values()]
    found = loraloom.evaluate(
        host, tokenizer, tasks, [None, "eight", "nine"], scoring="text", split="test", pairs=[]
    )
    for name in ("base", "eight", "nine"):
        shares = [100 * found.results[name][task]["accuracy"] for task in tasks]
        print(
            f"{name}: {fmean(shares[:8]):.1f} % in the eight lands, {shares[8]:.1f} % in the ninth"
        )
    print(f"tensors of the eight are the same: {same}")
    print(f"the ninth's training {trained - began:.0f} s, its router {fitted - trained:.1f} s")


def train(args: argparse.Namespace, base: Any) -> None:
    job = {
        "name": NINTH,
        "adapter": {"method": "lora", "rank": 4, "alpha": 8},
        "data": LANDS[NINTH],
        "train": {
            "learning_rate": 8e-3,
            "lr_scheduler": "cosine",
            "warmup_ratio": 0.1,
            "max_steps": 150,
            "batch_size": 16,
            "max_length": 64,
        },
    }
    run = {"base_model": args.base_model, "dtype": "float32", "jobs": [job]}
    loraloom.train({**run, "output_dir": str(args.output)}, overwrite=True, base=base)


if __name__ == "__main__":
    main()
