"""Prompts with questions of two lands, of which a router by prompt can take one adapter alone.

    python recipes/apart/two.py --base-model runs/mixture/tiny-base \
        --adapters runs/apart/lands/apart --others runs/apart/lands/token runs/apart/joint/seeds \
        --output runs/apart/two

Test questions q, Q and answers a, A of two lands, in four forms: `Q` alone (A is asked for), `q a.
Q` (A), `q. Q` (a), and `q. Q a.` (A). With `--same` both questions are of one land, which shows
what the form itself costs. Who is asked: each question's own adapter, the other's, the sum of both
at one half, the router by prompt with one and with two experts, Arrow, and the `--others`. Seed s
takes each land with the (s + 1)th after it. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import loraloom
from loraloom.data.skills import generate_skills, land_names

LANDS = {f"land{n}": {"task": f"skills@{n}of8", "scoring": "text"} for n in range(1, 9)}
# Of each form: whether the first question is asked for, and the prompt.
FORMS = {
    "Q": (False, "{Q}"),
    "q a. Q": (False, "{q} {a}. {Q}"),
    "q. Q": (True, "{q}. {Q}"),
    "q. Q a.": (False, "{q}. {Q} {a}."),
}
TASK = """\
data: {files: {test: test.jsonl}}
template: "{{ prompt }}"
choices: choices
answer: answer
answer_is: index
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--adapters", type=Path, required=True, help="of run.py")
    parser.add_argument("--others", type=Path, nargs="*", default=(), help="of NAME@SEED")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--limit", type=int, default=27, help="questions of a land in a form")
    parser.add_argument("--same", action="store_true", help="two questions of one land")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = loraloom.load_base_model(args.base_model, dtype="float32")
    host = loraloom.attach(model)
    found = [ask_seed(args, host, tokenizer, seed) for seed in range(args.seeds)]
    print("\n".join([f"| | {' | '.join(f'`{form}`' for form in FORMS)} |", "|---" * 5 + "|"]))
    for name in found[0]["Q"]:
        cells = [_mean([one[form][name] for one in found]) for form in FORMS]
        print(f"| {name} | {' | '.join(cells)} |")


def ask_seed(args: argparse.Namespace, host: Any, tokenizer: Any, seed: int) -> dict[str, Any]:
    """Give what is right by form and who was asked, and whose adapter the router chose."""
    path = args.output / f"{'same' if args.same else 'two'}-{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    names = load_all(args, host, tokenizer, seed)
    lands = [*LANDS]
    rows = [generate_skills("test", [name]) for name in land_names(len(LANDS))]
    rows = [of[: args.limit] for of in rows]
    (args.output / "two.yaml").write_text(TASK)
    shares: dict[str, dict[str, list[float]]] = {form: {} for form in FORMS}
    for first, land in enumerate(lands):
        second = first if args.same else (first + 1 + seed % 7) % len(lands)
        other = lands[second]
        added = f"{land}:0.5+{other}:0.5" if land != other else land
        for form, (is_first, _) in FORMS.items():
            asked = ask_for(form, rows[first], rows[second])
            (args.output / "test.jsonl").write_text("\n".join(map(json.dumps, asked)))
            those = list(dict.fromkeys([land, other, added, *names]))
            task = str(args.output / "two.yaml")
            found = loraloom.evaluate(host, tokenizer, task, those, pairs=[])
            own, wrong = (land, other) if is_first else (other, land)
            who = {"own": own, "the other's": wrong, "half of each": added}
            who |= {name: name for name in names}
            for name, key in who.items():
                share = 100 * found.results[key]["two"]["accuracy"]
                shares[form].setdefault(name, []).append(share)
            load = found.routing["prompt"]["tasks"]["two"]["load"][0]
            chosen = [100 * load[place] for place in (first, second)]
            for name, share in zip(("router: first's", "router: second's"), chosen, strict=True):
                shares[form].setdefault(name, []).append(share)
    for name in [*host.adapters]:
        host.remove(name)
    record = {form: {name: fmean(of) for name, of in by.items()} for form, by in shares.items()}
    path.write_text(json.dumps(record, indent=1))
    return record


def load_all(args: argparse.Namespace, host: Any, tokenizer: Any, seed: int) -> list[str]:
    for land in LANDS:
        host.load(land, args.adapters / f"{land}@{seed}")
    experts = {land: land for land in LANDS}
    host.add("arrow", loraloom.RoutedConfig(experts=experts, router="arrow"))
    for name, top_k in (("prompt", 1), ("prompt-top-2", 2)):
        host.add(name, loraloom.RoutedConfig(experts=experts, top_k=top_k))
        loraloom.fit_router(host, tokenizer, name, LANDS, limit=200)
    others = [path for of in args.others for path in sorted(of.glob(f"*@{seed}"))]
    for path in others:
        host.load(path.name.partition("@")[0], path)
    return ["prompt", "prompt-top-2", "arrow", *(path.name.partition("@")[0] for path in others)]


def ask_for(form: str, first: list[Any], second: list[Any]) -> list[dict[str, Any]]:
    """Put each question of a land and one of another skill in front of it together."""
    is_first, template = FORMS[form]
    asked = []
    # the first land's questions are turned by one, so that the two are of different skills
    for one, two in zip([*first[1:], first[0]], second, strict=True):
        answer = one["choices"][one["answer"]]
        prompt = template.format(q=one["question"], a=answer, Q=two["question"])
        asked.append({**(one if is_first else two), "prompt": prompt})
    return asked


def _mean(values: Sequence[float]) -> str:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{fmean(values):.1f} ± {error:.1f}"


if __name__ == "__main__":
    main()
