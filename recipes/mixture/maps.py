"""Where does a mixture win? Maps of studies, each as `run.py` makes them.

    python recipes/mixture/maps.py recipes/mixture/tiny.yaml --output runs/mixture/maps \
        --lands 4,32 --capacity 1,4                  # how much is learnt, how much room there is
    python recipes/mixture/maps.py recipes/mixture/tiny.yaml --output runs/mixture/maps \
        --steps 400,1600 --experts 4,8               # how long, and how many experts share a size
    python recipes/mixture/table.py runs/mixture/maps

The run file has the jobs `mixlora`, `lora-compute` and `lora-size`. Capacity multiplies the rank of
the experts; --experts keeps the sum of their ranks. The other ranks follow: `lora-compute`, and the
mixture's attention, have what a token sees of the experts, and `lora-size` is the smallest that has
no fewer weights than the mixture. Every alpha keeps its share of its rank.

Every cell is resumable and has a directory of its own. What follows `--` goes to `run.py`:

    ... --lands 4,32 -- --seeds 0,1,2 --only mixlora,lora-size
"""

from __future__ import annotations

import argparse
import math
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import loraloom

OPTIONS = ("--lands", "--capacity", "--steps", "--experts")
AXES = tuple(option[2:] for option in OPTIONS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog="What follows -- goes to run.py."
    )
    parser.add_argument("run_file", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    for option in OPTIONS:
        parser.add_argument(option, type=lambda text: [*map(int, text.split(","))])
    own, more = _parted(sys.argv[1:] if arguments is None else arguments)
    args = parser.parse_args(own)
    recipe = runpy.run_path(str(Path(__file__).with_name("run.py")))
    words = [str(args.run_file), *more]
    asked = recipe["parse"]([*words, f"--output={args.output}"])
    asked.only = None  # ranks follow from all of them
    run = recipe["read_run"](asked)
    for name, options in cells(run, {axis: getattr(args, axis) for axis in AXES}):
        print(f"== {name}", flush=True)
        recipe["main"]([*words, f"--output={args.output / name}", *options])


def _parted(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Part what is for `run.py`, after `--`, from what stands before."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place + 1 :]


def cells(
    run: loraloom.RunConfig, axes: Mapping[str, Sequence[int] | None]
) -> Iterator[tuple[str, list[str]]]:
    """Give each cell's name and what it asks of `run.py`."""
    model, _ = loraloom.load_base_model(run.base_model, dtype=run.dtype, device=run.device)
    base = loraloom.attach(model).base
    given = {axis: values for axis, values in axes.items() if values is not None}
    for values in product(*given.values()):
        at = dict(zip(given, values, strict=True))
        options = []
        if "lands" in at:
            options.append(f"--task=skills@{at['lands']}")
        if "steps" in at:
            options.append(f"--each=train.max_steps={at['steps']}")
        changes = sized(run, base, at.get("capacity", 1), at.get("experts"))
        options += [f"--set=jobs.{path}={value:g}" for path, value in changes.items()]
        yield "-".join(f"{axis}{value:03}" for axis, value in at.items()), options


def sized(
    run: loraloom.RunConfig, base: Any, capacity: int, num_experts: int | None
) -> dict[str, float]:
    """Give the settings of ranks and experts in a cell, by job and path."""
    adapters = {job.name: job.adapter for job in run.jobs}
    mixture: Any = adapters["mixlora"]
    num_experts = num_experts or mixture.num_experts
    rank, rest = divmod(mixture.expert_config.rank * mixture.num_experts * capacity, num_experts)
    if rest:
        raise SystemExit(f"--experts must divide the sum of the experts' ranks, got {num_experts}")
    seen = rank * mixture.top_k
    experts = ranked(mixture.expert_config, rank)
    own = {"num_experts": num_experts, **ranked(mixture, seen)}
    settings = mixture.model_dump(exclude_unset=True) | own | {"experts": experts}
    num_weights = weights(type(mixture).model_validate(settings), base)
    size = math.ceil(num_weights / weights(loraloom.LoraConfig(**_rank_one(adapters)), base))
    changes = {f"mixlora.adapter.{name}": value for name, value in own.items()}
    changes |= {f"mixlora.adapter.experts.{name}": value for name, value in experts.items()}
    for name, its_rank in (("lora-compute", seen), ("lora-size", size)):
        ranks = ranked(adapters[name], its_rank)
        changes |= {f"{name}.adapter.{setting}": value for setting, value in ranks.items()}
    return changes


def ranked(adapter: Any, rank: int) -> dict[str, float]:
    """Give a rank, and the alpha that is as large beside it as it was."""
    return {"rank": rank, "alpha": adapter.alpha / adapter.rank * rank}


def _rank_one(adapters: Mapping[str, Any]) -> dict[str, Any]:
    return adapters["lora-size"].model_dump(exclude_unset=True) | {"rank": 1}


def weights(adapter: Any, base: Any) -> int:
    """Count what an adapter trains on a base model."""
    return sum(map(math.prod, adapter.tensor_shapes(base).values()))


if __name__ == "__main__":
    main()
