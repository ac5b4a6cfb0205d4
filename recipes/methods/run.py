"""All methods on one task, at the size of a LoRA and at its compute, each at its own best rate.

    python recipes/methods/run.py --base-model smollm2-135m --task skills --output runs/methods

Each method's rank is chosen so that it has as many weights as the LoRA, or multiplies as much in a
forward of training; then `recipes/mixture/run.py` searches its rate, trains seeds and asks test
questions. Run it again after Ctrl-C or a kill: what is done is not done again.
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

import loraloom

STUDIES = Path(__file__).parents[1] / "mixture"
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "dora": {"method": "lora", "weight_decomposition": True},
    "vera": {"method": "vera"},
    "moslora": {"method": "moslora"},
    "hydralora": {"method": "hydralora", "num_experts": 3},
    "loramoe": {"method": "loramoe", "num_experts": 4},
    "mola": {"method": "mola", "num_experts": 4, "top_k": 2},
    "dynmole": {"method": "dynmole", "num_experts": 4},
    "smora": {"method": "smora", "top_k": 2},
    "mixlora": {"method": "mixlora", "num_experts": 4, "top_k": 2},
    "mixdora": {"method": "mixlora", "num_experts": 4, "top_k": 2, "weight_decomposition": True},
}
"""By the names of their jobs; the first is what the others are compared with."""
MOST_RANK = 1024
ROWS, LENGTH = 4, 64
"""Of the forward whose multiplications are counted."""

Measure = Callable[[loraloom.Host, str], int]


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    model, _ = loraloom.load_base_model(args.base_model, dtype=args.dtype)
    host = loraloom.attach(model)
    study = runpy.run_path(str(STUDIES / "run.py"))
    table = runpy.run_path(str(STUDIES / "table.py"))
    for kind in args.at:
        output = args.output / kind
        output.mkdir(parents=True, exist_ok=True)
        run_file = output / "run.yaml"
        if not run_file.exists():
            run_file.write_text(yaml.safe_dump(run_of(args, host, MEASURES[kind])))
        study["main"]([str(run_file), f"--output={output}", *args.study])
    print("\n".join(table["table"](list(table["read_studies"]([args.output])))))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        epilog="Other options (--rates, --seeds, --search-seeds, --limit …) go to mixture/run.py.",
    )
    add = parser.add_argument
    add("--base-model", required=True)
    add("--dtype", default="auto")
    add("--task", default="skills")
    add("--data", help="directory of the task's files; else the hub, or made")
    add("--output", type=Path, required=True)
    add("--rank", type=int, default=8, help="of the LoRA")
    add("--steps", type=int, default=400)
    add("--batch-size", type=int, default=16)
    add("--methods", type=lambda names: names.split(","), default=list(METHODS))
    add("--at", type=lambda names: names.split(","), default=list(MEASURES), help="size,compute")
    args, args.study = parser.parse_known_args(arguments)
    unknown = {*args.methods} - {*METHODS} | {*args.at} - {*MEASURES}
    if unknown:
        known = f"{', '.join(METHODS)}; {', '.join(MEASURES)}"
        raise SystemExit(f"methods and --at must be among {known}, got {', '.join(unknown)}")
    return args


def run_of(args: argparse.Namespace, host: loraloom.Host, measure: Measure) -> dict[str, Any]:
    """Make the run file: a job of each method, fitted to the LoRA."""
    target = measured(host, settings_of("lora", args.rank), measure)
    asked = {"task": args.task, "scoring": "text"} | ({"path": args.data} if args.data else {})
    train = {"learning_rate": 1e-3, "lr_scheduler": "cosine", "warmup_ratio": 0.05}
    train |= {"batch_size": args.batch_size, "max_steps": args.steps, "save_steps": args.steps}
    jobs = []
    for name in args.methods:
        rank = fitted_rank(
            lambda rank, name=name: measured(host, settings_of(name, rank), measure), target
        )
        print(f"{name}: rank {rank}", flush=True)
        data = {**asked, "validation": asked}
        job = {"name": name, "adapter": settings_of(name, rank), "data": data, "train": train}
        jobs.append({**job, "eval": [{**asked, "limit": 288}]})
    base = {"base_model": args.base_model, "dtype": args.dtype, "output_dir": str(args.output)}
    return {**base, "jobs": jobs}


def settings_of(name: str, rank: int) -> dict[str, Any]:
    """Give a method's settings with a rank, and with a scaling that doesn't depend on it."""
    alpha = {} if name == "vera" else {"alpha": 2 * rank}
    own = {**METHODS[name], "rank": rank, **alpha}
    return own | ({"top_k": min(own["top_k"], rank)} if name == "smora" else {})


def fitted_rank(measure: Callable[[int], int], target: int) -> int:
    """Find the rank whose measure, which grows with it, is nearest to the target."""
    low, high = 1, MOST_RANK
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if measure(middle) <= target else (low, middle)
    return min((low, high), key=lambda rank: abs(measure(rank) - target))


def measured(host: loraloom.Host, settings: dict[str, Any], measure: Measure) -> int:
    """Measure a method on a host."""
    job = {"name": "measured", "adapter": settings, "data": {"task": "skills"}}
    job["train"] = {"learning_rate": 1e-3, "max_steps": 1}
    host.add("measured", loraloom.JobConfig.model_validate(job).adapter)
    try:
        return measure(host, "measured")
    finally:
        host.remove("measured")


def num_weights(host: loraloom.Host, name: str) -> int:
    """Count trained weights."""
    return sum(weight.numel() for weight in host.adapter(name).parameters())


def num_multiplications(host: loraloom.Host, name: str) -> int:
    """Count what a forward of training multiplies in matrix products, the base model's too."""
    ids = torch.randint(host.config.vocab_size, (ROWS, LENGTH), generator=torch.Generator())
    with FlopCounterMode(display=False) as counter:
        host.hidden(ids, adapters=[name] * ROWS, training=True)
    return counter.get_total_flops()


MEASURES: dict[str, Measure] = {"size": num_weights, "compute": num_multiplications}


if __name__ == "__main__":
    main()
