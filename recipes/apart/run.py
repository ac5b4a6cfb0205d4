"""Adapters trained apart, each on data of its own, and what makes one model of them.

    python recipes/apart/run.py recipes/apart/lands.yaml --output runs/apart/lands \
        --joint runs/apart/joint

Each source's adapter sees its own rows alone. Of all of them are made: their average, merges
(PEFT's linear, SVD, TIES and DARE), Arrow, a router by prompt, and one by token that is trained
on the rows of all sources. Beside them are adapters that had all rows together: those of `joint` in
the file, and of a study of `joint.yaml` that `--joint` names. All are asked the test questions of
each source, and the router by prompt is compared with each of them on the same questions. `without
its own` is the routed model whose adapter for the question's source was taken away. What is done is
not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml

import loraloom

MERGES = ("linear", "svd", "ties", "dare_linear")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("settings", type=Path, help="sources, adapters and rates to try, as YAML")
    parser.add_argument("--base-model", help="in place of the file's")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--joint", type=Path, help="a study of joint.yaml")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=200, help="of a source, for the router")
    parser.add_argument("--layers", type=int, default=0, help="that the router reads behind")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    args.of = yaml.safe_load(args.settings.read_text())
    args.base_model = args.base_model or args.of["base_model"]
    check_study(args)
    model, tokenizer = loraloom.load_base_model(args.base_model, dtype=args.of["dtype"])
    base, kinds = (loraloom.attach(model), tokenizer), ["apart", *args.of["jobs"]]
    rates = {}
    for kind in kinds:
        tried = args.of["jobs"].get(kind, args.of["apart"])["rates"]
        rates[kind] = best_rates(args, base, kind, tried)
        jobs = [one for seed in range(args.seeds) for one in jobs_of(args, kind, seed)]
        for job in jobs:
            job["train"]["learning_rate"] = rates[kind][job["name"].partition("@")[0]]
        train(args, base, kind, jobs)
    found = [ask_seed(args, base, seed) for seed in range(args.seeds)]
    (args.output / "result.json").write_text(json.dumps({"rates": rates, "seeds": found}, indent=1))
    print("\n".join(table(found)))


def check_study(args: argparse.Namespace) -> None:
    """Hold an output to its settings: what is done is not done again."""
    path = args.output / "study.json"
    asked = {
        name: str(getattr(args, name)) for name in ("base_model", "joint", "prompts", "layers")
    }
    asked["settings"] = args.of
    if not path.exists():
        path.write_text(json.dumps(asked, indent=1))
    elif (old := json.loads(path.read_text())) != asked:
        changed = ", ".join(name for name in asked if old.get(name) != asked[name])
        raise SystemExit(f"{args.output} is a study with other {changed}; choose another --output")


def jobs_of(args: argparse.Namespace, kind: str, seed: int) -> list[dict[str, Any]]:
    """Of a seed, a job for each source, or one for all sources together."""
    sources = args.of["sources"]
    own = args.of["jobs"].get(kind, args.of["apart"])
    adapter = dict(own["adapter"])
    if adapter["method"] == "routed":
        adapter["experts"] = {
            name: str(args.output / "apart" / f"{name}@{seed}") for name in sources
        }
    shares = args.of.get("shares", {})  # of a source's rows that are mixed, all by default
    mixed = [source | {"weight": shares.get(name, 1)} for name, source in sources.items()]
    data = sources if kind == "apart" else {kind: own.get("data", {"mix": mixed})}
    held_out = args.of.get("held_out")  # by default the same source's validation rows
    is_searched = len(own["rates"]) > 1
    return [
        {
            "name": f"{name}@{seed}",
            "seed": seed,
            "adapter": adapter,
            "data": source | ((held_out or {"validation": source}) if is_searched else {}),
            "train": args.of["train"] | own.get("train", {}),
        }
        for name, source in data.items()
    ]


def best_rates(
    args: argparse.Namespace, base: Any, kind: str, rates: Sequence[float]
) -> dict[str, float]:
    """Train jobs at each rate; give the one with the least loss on held-out rows.

    It is that of the mean of losses, or each job's own if the settings have `rate_by_source`.
    """
    path = args.output / f"rates-{kind}.json"
    # a router by token learns on adapters that are there, those of the first seed
    seed = 0 if kind in args.of["jobs"] else 100
    jobs = {job["name"].partition("@")[0]: job for job in jobs_of(args, kind, seed)}
    if len(rates) == 1:
        return dict.fromkeys(jobs, rates[0])
    if not path.exists():
        tried = [
            {**job, "name": f"{name}-{rate:g}"} | {"train": {**job["train"], "learning_rate": rate}}
            for rate in rates
            for name, job in jobs.items()
        ]
        train(args, base, f"search-{kind}", tried)
        directory = args.output / f"search-{kind}"
        losses = {
            name: {f"{rate:g}": loss_of(directory / f"{name}-{rate:g}") for rate in rates}
            for name in jobs
        }
        path.write_text(json.dumps(losses))
    losses = json.loads(path.read_text())
    print(kind, "losses by rate:", losses, flush=True)
    means = {
        rate: fmean(of[rate] for of in losses.values()) for rate in next(iter(losses.values()))
    }
    by_source = args.of.get(kind, {}).get("rate_by_source", False)
    best = {name: losses[name] if by_source else means for name in jobs}
    return {name: float(min(of, key=of.get)) for name, of in best.items()}


def loss_of(directory: Path) -> float:
    """Read a job's last loss on held-out rows; of one that diverged, infinity."""
    result = json.loads((directory / "result.json").read_text())
    return result["metrics"].get("eval/loss", math.inf)


def train(args: argparse.Namespace, base: Any, name: str, jobs: list[Any]) -> None:
    directory = args.output / name
    done, path = {}, directory / "trained.json"
    if path.exists():
        done = json.loads(path.read_text())
    if not (jobs := [job for job in jobs if job["name"] not in done]):
        return
    resume, began = (directory / ".checkpoints").exists(), time.monotonic()
    run = {"base_model": args.base_model, "dtype": args.of["dtype"], "jobs": jobs}
    run |= {"output_dir": str(directory), **args.of.get("run", {})}
    loraloom.train(run, resume=resume, overwrite=not resume, base=base)
    seconds = (time.monotonic() - began) / len(jobs)
    path.write_text(json.dumps(done | {job["name"]: seconds for job in jobs}))
    shutil.rmtree(directory / ".checkpoints", ignore_errors=True)  # more seeds are another run


def ask_seed(args: argparse.Namespace, base: Any, seed: int) -> dict[str, Any]:
    """Make one model of a seed's adapters in every way, and ask them all."""
    path = args.output / f"asked-{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    host, tokenizer = base
    sources, own = args.of["sources"], list(args.of["sources"])
    for name in own:
        host.load(name, args.output / "apart" / f"{name}@{seed}")
    merges = args.of.get("merges", MERGES)
    for merge in merges:
        host.load(merge, pefts_merge(args, seed, merge))
    experts = {name: name for name in own}
    host.add("arrow", loraloom.RoutedConfig(experts=experts, router="arrow"))
    host.add("prompt", loraloom.RoutedConfig(experts=experts, num_layers_read=args.layers))
    began = time.monotonic()
    fit = loraloom.fit_router(host, tokenizer, "prompt", sources, limit=args.prompts)
    seconds = time.monotonic() - began
    names = ["arrow", "prompt", *merges]
    for kind in args.of["jobs"]:
        host.load(kind, args.output / kind / f"{kind}@{seed}")
        names.append(kind)
    for path in sorted((args.joint / "seeds").glob(f"*@{seed}")) if args.joint else ():
        host.load(path.name.partition("@")[0], path)
        names.append(path.name.partition("@")[0])
    average = "+".join(f"{name}:{1 / len(own)}" for name in own)
    asked = {name: source for name, source in sources.items() if "task" in source}

    def ask(names: Sequence[str | None], tasks: Sequence[str], **options: Any) -> Any:
        """Put the test questions of tasks to adapters."""
        options |= {"split": args.of.get("split"), "data": args.of.get("data")}
        options |= {"limit": args.of.get("limit"), "scoring": next(iter(asked.values()))["scoring"]}
        return loraloom.evaluate(host, tokenizer, tasks, names, **options)

    tasks = [source["task"] for source in asked.values()]
    pairs = [("prompt", name) for name in (average, *names) if name != "prompt"]
    found = ask([None, average, *names], tasks, pairs=pairs)
    found.write(args.output / f"evaluation-{seed}.json")
    shares = {
        name: [100 * of[task]["accuracy"] for task in tasks] for name, of in found.results.items()
    }
    places: dict[Any, int] = {}
    answers = answers_of(found, places)
    right = {("average" if name == average else name): fmean(of) for name, of in shares.items()}
    by_source: dict[str, list[float]] = {"oracle": [], "another's": [], "without its own": []}
    for name, before in zip(asked, [list(asked)[-1], *asked], strict=False):
        task = asked[name]["task"]
        others = {other: other for other in own if other != name}
        host.add("without", loraloom.RoutedConfig(experts=others, num_layers_read=args.layers))
        rows = {other: sources[other] for other in others}
        loraloom.fit_router(host, tokenizer, "without", rows, limit=args.prompts)
        of = ask([name, before, "without"], [task], pairs=[])
        host.remove("without")
        answered = answers_of(of, places)
        for role, one in (("oracle", name), ("another's", before), ("without its own", "without")):
            by_source[role].append(100 * of.results[one][task]["accuracy"])
            for what, values in answered[one].items():
                answers.setdefault(role, {}).setdefault(what, []).extend(values)
    answers["average"] = answers.pop(average)
    record = {
        "right": {name: right[name] for name in ("base", "average", *names)},
        **{name: fmean(of) for name, of in by_source.items()},
        "routed right": 100 * fit.accuracy,
        "held out": fit.chosen,
        "seconds of the router": seconds,
        "shares": shares | by_source,
        "answers": answers,
        "chosen": {task: of["load"][0] for task, of in found.routing["prompt"]["tasks"].items()},
    }
    for name in [*host.adapters]:
        host.remove(name)
    path = args.output / f"asked-{seed}.json"
    path.write_text(json.dumps(record, indent=1))
    return record


def answers_of(found: Any, places: dict[Any, int]) -> dict[str, dict[str, list[float]]]:
    """Give for each question which is right, and its right answer's loss a character, by adapter.

    `places` are those of the labels among the choices, by task; a choice that won shows its own.
    """
    lines = list(found.lines())
    for line in lines:
        places[line["task"], line["chosen"]] = line["scores"].index(max(line["scores"]))
    answers: dict[str, dict[str, list[float]]] = {}
    for line in lines:
        of = answers.setdefault(line["adapter"], {"right": [], "loss": []})
        of["right"].append(int(line["correct"]))
        of["loss"].append(-line["scores"][places[line["task"], line["correct_label"]]])
    return answers


def pefts_merge(args: argparse.Namespace, seed: int, merge: str) -> Path:
    """Combine a seed's adapters by a function of PEFT, with its defaults."""
    from peft import PeftModel

    model, _ = loraloom.load_base_model(args.base_model, dtype=args.of["dtype"])
    own = list(args.of["sources"])
    paths = {name: args.output / "apart" / f"{name}@{seed}" for name in own}
    model = PeftModel.from_pretrained(model, paths[own[0]], adapter_name=own[0])
    for name in own[1:]:
        model.load_adapter(paths[name], adapter_name=name)
    weights = [1.0 if merge in ("svd", "ties") else 1 / len(own)] * len(own)
    model.add_weighted_adapter(own, weights, merge, combination_type=merge, density=0.5)
    model.save_pretrained(args.output / "merges" / str(seed), selected_adapters=[merge])
    return args.output / "merges" / str(seed) / merge


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """Give means of seeds, and the router by prompt less each on the same questions."""

    def means(name: str, what: str) -> tuple[list[float], list[float]]:
        """Of the seeds, and of the questions."""
        values = [one["answers"][name][what] for one in found]
        return [fmean(of) for of in values], [fmean(of) for of in zip(*values, strict=True)]

    lines = ["| | right, % | router by prompt less it | p | loss |", "|---|---|---|---|---|"]
    for name in found[0]["answers"]:
        of_seeds, of_questions = means(name, "right")
        paired = loraloom.compare_paired(means("prompt", "right")[1], of_questions)
        difference = f"{100 * paired.difference:.1f} ± {100 * (paired.stderr or 0):.1f}"
        right, loss = _mean([100 * share for share in of_seeds]), fmean(means(name, "loss")[0])
        lines.append(f"| {name} | {right} | {difference} | {paired.p_value:.1g} | {loss:.3f} |")
    routed = [one["routed right"] for one in found]
    return [*lines, f"prompts routed right, held out: {_mean(routed)}"]


def _mean(values: Sequence[float]) -> str:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{fmean(values):.1f} ± {error:.1f}"


if __name__ == "__main__":
    main()
