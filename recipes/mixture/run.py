"""Which of several methods learns more, each at its own best rate?

    python recipes/mixture/run.py recipes/mixture/skills.yaml --output runs/mixture/skills

The jobs of the run file are the methods; all learn the same task or data set. What is done is not
done again, what was interrupted goes on: run it again after Ctrl-C or a kill.

1. Each method trains to the end with each of the rates and each of the search's seeds. The mean
   accuracy on validation questions (`eval` in the run file), or another `--metric`, chooses its
   rate. A single rate is taken as it is.
2. Every method trains at its rate with other seeds, all of them in the same steps.
3. Test questions are asked once, of all of them, and questions that were learnt (unless
   `--test-only`). `result.json` in the output has the accuracies and the pairs that were
   compared on the same questions and over the same seeds.

Without `eval` in the run file all of this is by loss, on the rows of a data set that has the splits
validation and test.

`table.py` makes a table of several outputs.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from operator import sub
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

import loraloom

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
SEARCH_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)
WORST = 1e9

Base = tuple[loraloom.Host, Any]
"""The base model and its tokenizer."""


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    sys.path.append(str(args.run_file.parent))
    for module in args.modules:
        import_module(module)
    run = read_run(args)
    args.output.mkdir(parents=True, exist_ok=True)
    _check_study(args, run)
    if args.search_only:
        search_all(run, args, load_base(run))
    else:
        kept(args.output / "result.json", lambda: study(run, args))
        print(f"python recipes/mixture/table.py {args.output}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("run_file", type=Path, help="its jobs are the methods")
    add("--output", type=Path, required=True, help="directory of this study alone")
    add(
        "--import",
        dest="modules",
        type=lambda names: names.split(","),
        default=[],
        help="modules that register methods, beside the run file or installed",
    )
    add("--task", help="in place of the task in every job's data and eval")
    add("--each", action="append", default=[], metavar="PATH=VALUE", help="set it in every job")
    add("--set", action="append", default=[], metavar="PATH=VALUE", help="set it in the run file")
    add("--only", type=lambda names: names.split(","), help="names of jobs to take; else all")
    add("--rates", type=_numbers(float), default=RATES, help="to try, separated by commas")
    add("--metric", help="chooses the rate: eval/loss; else the accuracy of the first in eval")
    add("--search-seeds", type=_numbers(int), default=SEARCH_SEEDS)
    add("--search-only", action="store_true", help="end when the rates are chosen")
    add("--seeds", type=_numbers(int), default=SEEDS, help="that are trained and tested")
    add("--limit", type=int, default=1152, help="questions of the test, and of those learnt from")
    add("--test-only", action="store_true", help="ask no questions that were learnt")
    add("--compare", action="append", metavar="A:B", help="else the first job with each other")
    return parser.parse_args(arguments)


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(map(kind, text.split(",")))


def read_run(args: argparse.Namespace) -> loraloom.RunConfig:
    """Read the run file with what the options change."""
    settings = yaml.safe_load(args.run_file.read_text())
    settings = json.loads(json.dumps(settings))  # jobs share no objects, as they do by aliases
    for change in args.set:
        change_setting(settings, change)
    wanted = [*args.each]
    if args.task is not None:
        wanted += [f"data.task={args.task}", f"eval.0.task={args.task}"]
    for job in settings["jobs"]:
        held_out = args.task is not None and "validation" in job["data"]
        for change in [*wanted, *[f"data.validation.task={args.task}"] * held_out]:
            change_setting(job, change)
    run = loraloom.RunConfig.model_validate(settings)
    names = [job.name for job in run.jobs]
    unknown = set(args.only or names) - set(names)
    if unknown:
        raise SystemExit(f"--only must name jobs of {args.run_file}, got {', '.join(unknown)}")
    if not all((job.eval and job.data.task) or by_loss(job) for job in run.jobs):
        raise SystemExit(
            f"every job of {args.run_file} must learn a task and have it in eval, or learn a "
            "dataset with splits and have its validation split in validation, without eval"
        )
    return run.model_copy(
        update={"jobs": tuple(job for job in run.jobs if job.name in (args.only or names))}
    )


def by_loss(job: loraloom.JobConfig) -> bool:
    """Whether a job learns a data set with splits, whose loss is all there is to measure."""
    held_out = job.data.validation
    has_splits = held_out is not None and not Path(held_out.dataset or "").is_file()
    return not job.eval and job.data.dataset is not None and has_splits


def change_setting(settings: Any, change: str) -> None:
    """Apply a `path=value`, `jobs.mixlora.adapter.rank=4` for instance; jobs go by their names."""
    path, _, value = change.partition("=")
    *outer, last = path.split(".")
    for part in outer:
        settings = _part_of(settings, part)
    settings[last] = yaml.safe_load(value)


def _part_of(settings: Any, name: str) -> Any:
    if isinstance(settings, list):
        return settings[int(name)] if name.isdigit() else _job_of(settings, name)
    return settings.setdefault(name, {})


def _job_of(jobs: list[Any], name: str) -> Any:
    named = {job["name"]: job for job in jobs}
    if name not in named:
        raise SystemExit(f"--set must name one of the jobs {', '.join(named)}, got {name}")
    return named[name]


def _check_study(args: argparse.Namespace, run: loraloom.RunConfig) -> None:
    """Hold an output to the settings that it was begun with."""
    settings = {"run": as_settings(run), "rates": args.rates, "search_seeds": args.search_seeds}
    settings |= {"seeds": args.seeds, "limit": args.limit, "compare": args.compare}
    settings |= {"metric": args.metric} | ({"test_only": True} if args.test_only else {})
    text = json.dumps(settings, sort_keys=True)
    if kept(args.output / "study.json", lambda: json.loads(text)) != json.loads(text):
        raise SystemExit(
            f"--output must be a new directory, got {args.output}, which was begun with other "
            "settings (study.json)"
        )


def kept(path: Path, compute: Callable[[], Any]) -> Any:
    """Return what a file holds; if there is none yet, compute and write it."""
    if not path.exists():
        aside = path.with_suffix(".new")
        aside.write_text(json.dumps(compute(), indent=2))
        os.replace(aside, path)
    return json.loads(path.read_text())


def study(run: loraloom.RunConfig, args: argparse.Namespace) -> dict[str, Any]:
    """Search, train and score; the record of it."""
    began = time.monotonic()
    base = load_base(run)
    searched = search_all(run, args, base)
    rates = {name: float(next(iter(values))) for name, values in searched.items()}
    trained = kept(args.output / "trained.json", lambda: train_seeds(run, rates, args, base))
    record = score(run, args, base)
    for name, method in record["methods"].items():
        at_edge = len(args.rates) > 1 and rates[name] in (min(args.rates), max(args.rates))
        method |= {"rate": rates[name], "at_edge": at_edge, "searched": searched[name]}
        method |= trained[name]
    first = run.jobs[0]
    return {
        "study": args.output.name,
        "base_model": run.base_model,
        "task": first.data.task or first.data.dataset,
        "steps": first.train.max_steps,
        "seeds": len(args.seeds),
        "seconds_of_last_start": round(time.monotonic() - began),
        **record,
    }


def load_base(run: loraloom.RunConfig) -> Base:
    """Load the base model that all methods share."""
    model, tokenizer = loraloom.load_base_model(run.base_model, dtype=run.dtype, device=run.device)
    return loraloom.attach(model), tokenizer


def search_all(
    run: loraloom.RunConfig, args: argparse.Namespace, base: Base
) -> dict[str, dict[str, float]]:
    """Give each method's means by rate, as `search` does."""
    searched = {}
    for job in run.jobs:
        path = args.output / f"search-{job.name}.json"
        searched[job.name] = kept(path, lambda job=job: search(run, job, args, base))
        means = [f"{rate}: {mean:.3f}" for rate, mean in searched[job.name].items()]
        print(job.name, *means, sep="  ", flush=True)
    return searched


def search(
    run: loraloom.RunConfig, job: loraloom.JobConfig, args: argparse.Namespace, base: Base
) -> dict[str, float]:
    """Give a method's mean of the metric by rate, the best rate first; runs that fail are worst."""
    if len(args.rates) == 1:
        return {f"{args.rates[0]:g}": 0.0}
    metric = args.metric or ("eval/loss" if by_loss(job) else job.eval[0].metric)
    sign = -1 if metric.endswith("loss") else 1
    directory = args.output / f"search-{job.name}"
    questions = {"eval": []} if metric == "eval/loss" else {}
    sweep = {
        "job": as_settings(job) | questions,
        "parameters": {
            "train.learning_rate": list(args.rates),
            "seed": list(args.search_seeds),
        },
        "metric": metric,
    }
    train(run, directory, {"sweep": sweep}, base)
    values: dict[str, list[float]] = {f"{rate:g}": [] for rate in args.rates}
    with (directory / "sweep.csv").open() as file:
        for row in csv.DictReader(file):
            is_whole = row["status"] == "finished" and row[metric]
            value = float(row[metric]) if is_whole else -sign * WORST
            values[f"{float(row['train.learning_rate']):g}"].append(value)
    means = {rate: fmean(found) for rate, found in values.items()}
    return dict(sorted(means.items(), key=lambda item: -sign * item[1]))


def train_seeds(
    run: loraloom.RunConfig, rates: dict[str, float], args: argparse.Namespace, base: Base
) -> dict[str, Any]:
    """Train every method with every seed; the last weights count, and nothing is evaluated."""
    jobs = []
    for job in run.jobs:
        settings = as_settings(job) | {"eval": []}
        settings["train"] |= {"learning_rate": rates[job.name]}
        settings["train"].pop("eval_steps", None)
        settings["data"].pop("validation", None)
        jobs += [{**settings, "name": f"{job.name}@{seed}", "seed": seed} for seed in args.seeds]
    results = train(run, args.output / "seeds", {"jobs": jobs}, base)
    trained: dict[str, Any] = {}
    for result in results:
        method = trained.setdefault(result.job.rpartition("@")[0], {"failed": 0})
        method["parameters"] = result.num_parameters
        method["failed"] += result.status == "failed"
    return trained


def train(
    run: loraloom.RunConfig, directory: Path, content: dict[str, Any], base: Base
) -> list[loraloom.JobResult]:
    settings = as_settings(run) | {"output_dir": str(directory), "jobs": [], **content}
    resume = (directory / ".checkpoints").exists()
    print(f"{time.strftime('%H:%M:%S')} {directory}{', going on' * resume}", flush=True)
    return loraloom.train(settings, resume=resume, overwrite=not resume, base=base)


def score(run: loraloom.RunConfig, args: argparse.Namespace, base: Base) -> dict[str, Any]:
    """Ask test questions, and questions that were learnt, of every method with every seed."""
    host, tokenizer = base
    methods = [job.name for job in run.jobs]
    seeds_of = {name: [f"{name}@{seed}" for seed in args.seeds] for name in methods}
    names = [name for seeds in seeds_of.values() for name in seeds]
    for name in names:
        host.load(name, args.output / "seeds" / name)
    compared = args.compare or [f"{methods[0]}:{other}" for other in methods[1:]]
    named = [(first, second) for first, _, second in (text.partition(":") for text in compared)]
    pairs = [_as_asked(pair, args.seeds) for pair in named]
    of_loss = losses(base, run.jobs[0], "test", [None, *names], args.limit, pairs)
    measured, test = {"loss": _of_task(of_loss.results, "loss")}, of_loss
    if not args.test_only:
        learnt = losses(base, run.jobs[0], "train", names, args.limit, [])
        measured["train_loss"] = _of_task(learnt.results, "loss")
    for asked in run.jobs[0].eval[:1]:
        ask = partial(loraloom.evaluate, host, tokenizer, asked.task, limit=args.limit)
        ask = partial(ask, scoring=asked.scoring, data=asked.path)
        test = ask([None, *names], split="test", pairs=pairs)
        measured["accuracy"] = _of_task(test.results, "accuracy")
        if not args.test_only:
            learnt = ask(names, split="train", pairs=[])
            measured["train_accuracy"] = _of_task(learnt.results, "accuracy")
    test.write(args.output / "test.json")
    values = {
        metric: {method: [one[seed] for seed in seeds] for method, seeds in seeds_of.items()}
        for metric, one in measured.items()
    }
    (of_base,) = test.results["base"].values()
    return {
        "questions": of_base["num_examples"],
        "base": {metric: one["base"] for metric, one in measured.items() if "base" in one},
        "majority": of_base.get("majority"),
        "methods": {
            method: {
                **{metric: mean_and_stderr(one[method]) for metric, one in values.items()},
                "effective_experts": effective_experts(test.routing, seeds),
            }
            for method, seeds in seeds_of.items()
        },
        "comparisons": [
            {
                "first": first,
                "second": second,
                "over_questions": asdict(comparison),
                "over_seeds": {
                    metric: mean_and_stderr([*map(sub, one[first], one[second])])
                    for metric, one in values.items()
                },
            }
            for (first, second), comparison in zip(named, test.comparisons, strict=True)
        ],
    }


def _as_asked(pair: tuple[str, str], seeds: Sequence[int]) -> tuple[str, ...]:
    """A single seed is no group, and is compared by its own name."""
    return pair if len(seeds) > 1 else tuple(f"{name}@{seeds[0]}" for name in pair)


def _of_task(results: dict[str, Any], metric: str) -> dict[str, float]:
    """Give a metric by adapter where there is one task."""
    return {name: next(iter(tasks.values()))[metric] for name, tasks in results.items()}


def losses(
    base: Base,
    job: loraloom.JobConfig,
    split: str,
    names: Sequence[str | None],
    limit: int,
    pairs: Sequence[tuple[str, ...]],
) -> Any:
    """Measure each adapter's loss on the answers of a split, in nats a token."""
    of_job = job.eval[0] if job.eval else job.data.validation
    source = of_job.model_dump(exclude_unset=True, exclude={"limit"}) | {"split": split}
    length = None if job.eval else job.train.max_length
    return loraloom.evaluate_loss(*base, source, names, max_length=length, limit=limit, pairs=pairs)


def effective_experts(routing: dict[str, Any], names: Sequence[str]) -> list[float] | None:
    """Give the effective number of experts by layer, averaged over seeds; None without routers."""
    tasks = [task for name in names if name in routing for task in routing[name]["tasks"].values()]
    by_layer = zip(*(task["effective_experts"] for task in tasks), strict=True)
    return [fmean(layer) for layer in by_layer] or None


def mean_and_stderr(values: Sequence[float]) -> dict[str, Any]:
    """Give values with their mean, and its standard error over seeds."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": fmean(values), "stderr": error, "values": list(values)}


def as_settings(config: loraloom.RunConfig | loraloom.JobConfig) -> dict[str, Any]:
    """Give what was set, as a run file would have it."""
    return config.model_dump(mode="json", exclude_unset=True)


if __name__ == "__main__":
    main()
