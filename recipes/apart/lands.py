"""Eight adapters trained apart, each on a land of `skills@8`, and what makes one model of them.

    python recipes/apart/lands.py --base-model runs/mixture/tiny-base --output runs/apart/lands \
        --joint runs/apart/joint

Each land's adapter sees its own rows alone. Of the eight are made: their average, merges (linear,
SVD, and PEFT's TIES and DARE), Arrow, a router by prompt, and one by token that is trained on the
rows of all lands. `--joint` names a study of `joint.yaml` with adapters that had all rows together.
All are asked the test questions of each land. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import loraloom

LANDS = [f"land{number}" for number in range(1, 9)]
DATA = {name: {"task": f"skills@{name[4:]}of8", "scoring": "text"} for name in LANDS}
RATES = (4e-3, 8e-3, 1.6e-2)
TOKEN_RATES = (1e-3, 4e-3, 1.6e-2)
TRAIN = {"lr_scheduler": "cosine", "warmup_ratio": 0.1, "max_steps": 150, "max_length": 64}
JOINT = ("lora", "mixlora", "lora-4x", "mixlora-4x")
MERGES = ("linear", "svd", "ties", "dare_linear")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--joint", type=Path, help="a study of joint.yaml; without it none is asked"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=200, help="of a land, for its router")
    parser.add_argument("--layers", type=int, default=0, help="that the router reads behind")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = loraloom.load_base_model(args.base_model, dtype="float32")
    base = (loraloom.attach(model), tokenizer)
    rate = best_rate(args, base, "apart", RATES, [land_job(land, 100) for land in LANDS])
    apart = [land_job(land, seed, rate) for seed in range(args.seeds) for land in LANDS]
    train(args, base, "apart", apart)
    token_rate = best_rate(args, base, "token", TOKEN_RATES, [token_job(args, 0)])
    train(args, base, "token", [token_job(args, seed, token_rate) for seed in range(args.seeds)])
    found = [ask_seed(args, base, seed) for seed in range(args.seeds)]
    record = {"rates": {"apart": rate, "token": token_rate}, "seeds": found}
    (args.output / "result.json").write_text(json.dumps(record, indent=1))
    print("\n".join(table(found)))


def land_job(land: str, seed: int, rate: float = 0.0) -> dict[str, Any]:
    return {
        "name": f"{land}@{seed}",
        "seed": seed,
        "adapter": {"method": "lora", "rank": 4, "alpha": 8},
        "data": DATA[land] | {"validation": DATA[land]},
        "train": {**TRAIN, "batch_size": 16, "learning_rate": rate},
    }


def token_job(args: argparse.Namespace, seed: int, rate: float = 0.0) -> dict[str, Any]:
    """A router by token on the adapters of a seed, by the rows of all lands."""
    experts = {land: str(args.output / "apart" / f"{land}@{seed}") for land in LANDS}
    task = {"task": "skills@8", "scoring": "text"}
    return {
        "name": f"token@{seed}",
        "seed": seed,
        "adapter": {"method": "routed", "router": "token", "experts": experts, "top_k": 2},
        "data": task | {"validation": task},
        "train": {**TRAIN, "batch_size": 128, "learning_rate": rate},
    }


def best_rate(
    args: argparse.Namespace, base: Any, what: str, rates: Sequence[float], jobs: list[Any]
) -> float:
    """Train jobs at each rate; give the one with the least loss on validation rows, their mean."""
    path = args.output / f"rates-{what}.json"
    if not path.exists():
        tried = [
            {**job, "name": f"{job['name']}-{rate:g}"}
            | {"train": {**job["train"], "learning_rate": rate}}
            for rate in rates
            for job in jobs
        ]
        losses: dict[str, list[float]] = {}
        for result in train(args, base, f"search-{what}", tried):
            rate = result.job.partition("-")[2]
            losses.setdefault(rate, []).append(result.metrics["eval/loss"])
        path.write_text(json.dumps({rate: fmean(values) for rate, values in losses.items()}))
    means = json.loads(path.read_text())
    print(what, "loss by rate:", means, flush=True)
    return float(min(means, key=means.get))


def train(args: argparse.Namespace, base: Any, name: str, jobs: list[Any]) -> list[Any]:
    directory = args.output / name
    if (directory / "trained.json").exists():
        return []
    resume, began = (directory / ".checkpoints").exists(), time.monotonic()
    run = {"base_model": args.base_model, "output_dir": str(directory), "jobs": jobs}
    results = loraloom.train(run, resume=resume, overwrite=not resume, base=base)
    seconds = {"seconds": time.monotonic() - began, "jobs": len(jobs)}
    (directory / "trained.json").write_text(json.dumps(seconds))
    return results


def ask_seed(args: argparse.Namespace, base: Any, seed: int) -> dict[str, Any]:
    """Make one model of a seed's adapters in every way, and ask them all."""
    path = args.output / f"asked-{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    host, tokenizer = base
    for land in LANDS:
        host.load(land, args.output / "apart" / f"{land}@{seed}")
    for merge in MERGES[:2]:
        weight = 1 / len(LANDS) if merge == "linear" else 1.0
        host.combine(LANDS, [weight] * len(LANDS), merge, name=merge)
    for merge in MERGES[2:]:
        host.load(merge, pefts_merge(args, seed, merge))
    experts = {land: land for land in LANDS}
    host.add("arrow", loraloom.RoutedConfig(experts=experts, router="arrow"))
    host.add("prompt", loraloom.RoutedConfig(experts=experts, num_layers_read=args.layers))
    began = time.monotonic()
    fit = loraloom.fit_router(host, tokenizer, "prompt", DATA, limit=args.prompts)
    seconds = time.monotonic() - began
    host.load("token", args.output / "token" / f"token@{seed}")
    names = ["arrow", "prompt", "token", *MERGES]
    for name in JOINT if args.joint else ():
        host.load(name, args.joint / "seeds" / f"{name}@{seed}")
        names.append(name)
    average = "+".join(f"{land}:0.125" for land in LANDS)
    tasks = [source["task"] for source in DATA.values()]
    asked = [None, *LANDS, average, *names]
    found = loraloom.evaluate(host, tokenizer, tasks, asked, scoring="text", split="test", pairs=[])
    shares = {
        name: [100 * of[task]["accuracy"] for task in tasks] for name, of in found.results.items()
    }
    right = {("average" if name == average else name): fmean(of) for name, of in shares.items()}
    record = {
        "right": {name: right[name] for name in ("base", "average", *names)},
        "oracle": fmean(shares[land][place] for place, land in enumerate(LANDS)),
        "wrong land": fmean(shares[land][place - 1] for place, land in enumerate(LANDS)),
        "routed right": 100 * fit.accuracy,
        "seconds of the router": seconds,
        "chosen": {task: of["load"][0] for task, of in found.routing["prompt"]["tasks"].items()},
    }
    for name in [*host.adapters]:
        host.remove(name)
    path.write_text(json.dumps(record, indent=1))
    return record


def pefts_merge(args: argparse.Namespace, seed: int, merge: str) -> Path:
    """Combine a seed's adapters by a function of PEFT that loraloom lacks, with its defaults."""
    from peft import PeftModel

    model, _ = loraloom.load_base_model(args.base_model, dtype="float32")
    paths = {land: args.output / "apart" / f"{land}@{seed}" for land in LANDS}
    model = PeftModel.from_pretrained(model, paths[LANDS[0]], adapter_name=LANDS[0])
    for land in LANDS[1:]:
        model.load_adapter(paths[land], adapter_name=land)
    weights = [1.0 if merge == "ties" else 1 / len(LANDS)] * len(LANDS)
    model.add_weighted_adapter(LANDS, weights, merge, combination_type=merge, density=0.5)
    model.save_pretrained(args.output / "merges" / str(seed), selected_adapters=[merge])
    return args.output / "merges" / str(seed) / merge


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    columns = {name: [one["right"][name] for one in found] for name in found[0]["right"]}
    columns |= {name: [one[name] for one in found] for name in ("oracle", "wrong land")}
    oracle, lines = columns["oracle"], ["| | right, % | below the oracle |", "|---|---|---|"]
    for name, values in columns.items():
        below = [a - b for a, b in zip(oracle, values, strict=True)]
        lines.append(f"| {name} | {_mean(values)} | {_mean(below)} |")
    routed = [one["routed right"] for one in found]
    return [*lines, f"prompts routed right, held out: {_mean(routed)}"]


def _mean(values: Sequence[float]) -> str:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{fmean(values):.1f} ± {error:.1f}"


if __name__ == "__main__":
    main()
