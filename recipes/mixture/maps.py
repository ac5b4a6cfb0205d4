"""Where does a mixture win? Two maps of studies, each as `run.py` makes them.

    python recipes/mixture/maps.py recipes/mixture/tiny.yaml --output runs/mixture/maps \
        --lands 1,16,256 --capacity 1,2,4            # how much is learnt, how much room there is
    python recipes/mixture/maps.py recipes/mixture/tiny.yaml --output runs/mixture/maps \
        --steps 150,600 --experts 2,8                # how long, and how many experts share a size
    python recipes/mixture/table.py runs/mixture/maps

Capacity multiplies every rank and alpha of the run file, so that scalings stay. With --experts all
experts together keep their rank, and `lora-compute` has the rank that a token sees. Every cell is
resumable, and has a directory of its own. What follows `--` goes to `run.py`:

    ... --lands 1,16 -- --seeds 0,1,2 --only mixlora,lora-size
"""

from __future__ import annotations

import argparse
import runpy
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import yaml

import loraloom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    for axis in ("lands", "capacity", "steps", "experts"):
        parser.add_argument(f"--{axis}", type=lambda text: [*map(int, text.split(","))])
    parser.add_argument("more", nargs="*", help="options of run.py, after --")
    args = parser.parse_args()
    study = runpy.run_path(str(Path(__file__).with_name("run.py")))["main"]
    for name, options in cells(args):
        print(f"== {name}", flush=True)
        study([str(args.run_file), f"--output={args.output / name}", *options, *args.more])


def cells(args: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Give each cell's name and what it asks of `run.py`."""
    jobs = loraloom.RunConfig.model_validate(yaml.safe_load(args.run_file.read_text())).jobs
    axes = {
        axis: getattr(args, axis)
        for axis in ("lands", "capacity", "steps", "experts")
        if getattr(args, axis) is not None
    }
    for values in product(*axes.values()):
        at = dict(zip(axes, values, strict=True))
        options = []
        if "lands" in at:
            options.append(f"--task=skills@{at['lands']}")
        if "steps" in at:
            options.append(f"--each=train.max_steps={at['steps']}")
        sizes = [*sized(jobs, at.get("capacity", 1), at.get("experts"))]
        options += [f"--set={setting}" for setting in sizes]
        yield "-".join(f"{axis}{value:03}" for axis, value in at.items()), options


def sized(
    jobs: Sequence[loraloom.JobConfig], capacity: int, num_experts: int | None
) -> Iterator[str]:
    """Give the settings of ranks and experts in a cell, `jobs.0.adapter.rank=8` for instance."""
    for place, job in enumerate(jobs):
        path, adapter = f"jobs.{place}.adapter", job.adapter
        yield from ranks(path, adapter.rank * capacity, adapter.alpha * capacity)
        if isinstance(adapter, loraloom.MixLoraConfig):
            expert = adapter.expert_config
            factor = capacity * adapter.num_experts / (num_experts or adapter.num_experts)
            yield f"{path}.num_experts={num_experts or adapter.num_experts}"
            yield from ranks(f"{path}.experts", expert.rank * factor, expert.alpha * factor)
        elif job.name == "lora-compute" and num_experts is not None:
            (mixture,) = (one for one in jobs if one.adapter.experts_per_router)
            factor = capacity * mixture.adapter.experts_per_router / num_experts
            yield from ranks(path, adapter.rank * factor, adapter.alpha * factor)


def ranks(path: str, rank: float, alpha: float) -> Iterator[str]:
    """Give a rank, which must be whole, and its alpha."""
    if rank != int(rank):
        raise SystemExit(f"--experts must divide the experts' ranks together, got rank {rank:g}")
    yield f"{path}.rank={int(rank)}"
    yield f"{path}.alpha={alpha:g}"


if __name__ == "__main__":
    main()
