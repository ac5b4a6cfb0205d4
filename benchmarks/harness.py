"""lm-eval's tasks through loraloom's HostLM against lm-eval's own class for transformers models.

Both get the same base model and requests in one process and take turns, each at its best batch
size. Agreement is counted by question: another choice is a near tie where the two scores that
compete are closer than 1e-4.

    .venv/bin/python benchmarks/harness.py --limit 100 --output harness.json
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

import loraloom
from loraloom.eval.harness import HostLM, load_tasks

TOLERANCE = 1e-4
OURS, THEIRS = "loraloom", "lm-eval"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-model", default="smollm2-135m")
    parser.add_argument("--tasks", default="arc_easy,piqa", help="multiple choice tasks")
    parser.add_argument("--include", type=Path, help="YAML files of tasks, for local data")
    parser.add_argument("--limit", type=int, help="questions of a task; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trial", type=int, default=20, help="questions to find a batch size with")
    parser.add_argument("--batch-sizes", default="1,4,16,32", help="rows, for lm-eval")
    parser.add_argument("--batch-tokens", default="256,512,1024,2048", help="for loraloom")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


class Bench:
    """The base model, with loraloom on it only while loraloom's turn lasts."""

    def __init__(self, arguments: argparse.Namespace):
        self.model, self.tokenizer = loraloom.load_base_model(
            arguments.base_model, arguments.dtype, arguments.device
        )

    def score(self, who: str, size: int, requests: Sequence[Any]) -> tuple[list[Any], float]:
        """Answers of one of the two, and the seconds that they took, tokenising included."""
        host = loraloom.attach(self.model) if who == OURS else None
        if host is None:
            lm: Any = HFLM(pretrained=self.model, tokenizer=self.tokenizer, batch_size=size)
        else:
            lm = HostLM(host, self.tokenizer, max_tokens_per_batch=size)
        start = time.perf_counter()
        answers = lm.loglikelihood(requests, disable_tqdm=True)
        seconds = time.perf_counter() - start
        if host is not None:
            host.detach()
        return answers, seconds

    def best_size(self, who: str, sizes: Sequence[int], requests: Sequence[Any]) -> int:
        """The batch size that is quickest on some requests."""
        self.score(who, sizes[0], requests[:8])  # warm up
        seconds = {size: self.score(who, size, requests)[1] for size in sizes}
        print(who, "batch sizes:", {size: round(value, 2) for size, value in seconds.items()})
        return min(seconds, key=lambda size: seconds[size])


def by_question(requests: Sequence[Any], answers: Sequence[Any]) -> dict[Any, list[Any]]:
    """(request, log-likelihood) of each choice, by question."""
    groups: dict[Any, list[Any]] = {}
    for request, (log_likelihood, _) in zip(requests, answers, strict=True):
        groups.setdefault(request.doc_id, []).append((request, log_likelihood))
    return groups


def chosen(question: Sequence[Any], per_character: bool) -> tuple[int, list[float]]:
    """The place of the highest score, and all scores."""
    scores = [
        value / (len(request.args[1].lstrip()) if per_character else 1)
        for request, value in question
    ]
    return scores.index(max(scores)), scores


def agreement(requests: Sequence[Any], ours: Sequence[Any], theirs: Sequence[Any]) -> dict:
    """How many questions get the same choice, and how far log-likelihoods are apart."""
    pairs = list(
        zip(
            by_question(requests, ours).values(),
            by_question(requests, theirs).values(),
            strict=True,
        )
    )
    result: dict[str, Any] = {
        "num_questions": len(pairs),
        "num_requests": len(requests),
        "max_difference": max(abs(a[0] - b[0]) for a, b in zip(ours, theirs, strict=True)),
        "max_relative_difference": max(
            abs(a[0] - b[0]) / abs(b[0]) for a, b in zip(ours, theirs, strict=True)
        ),
        "different_greedy": sum(a[1] != b[1] for a, b in zip(ours, theirs, strict=True)),
    }
    for name, per_character in (("acc", False), ("acc_norm", True)):
        same = ties = 0
        for our, their in pairs:
            (mine, _), (other, scores) = chosen(our, per_character), chosen(their, per_character)
            same += mine == other
            ties += mine != other and abs(scores[mine] - scores[other]) < TOLERANCE
        result[name] = {
            "same": same,
            "near_ties": ties,
            "different": len(pairs) - same - ties,
        }
    return result


def main() -> None:
    arguments = parse_arguments()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = arguments.tasks.split(",")
    requests: dict[str, list[Any]] = {}
    trial: list[Any] = []
    for name, task in zip(names, load_tasks(names, arguments.include), strict=True):
        task.build_all_requests(limit=arguments.limit)
        requests[name] = task.instances
        trial += [request for request in requests[name] if request.doc_id < arguments.trial]
    bench = Bench(arguments)
    sizes = {
        who: bench.best_size(who, [int(size) for size in given.split(",")], trial)
        for who, given in ((THEIRS, arguments.batch_sizes), (OURS, arguments.batch_tokens))
    }
    report: dict[str, Any] = {"batch": sizes, "tasks": {}}
    for name in names:
        seconds: dict[str, list[float]] = {THEIRS: [], OURS: []}
        answers: dict[str, list[Any]] = {}
        for _ in range(arguments.rounds):
            for who, times in seconds.items():
                answers[who], spent = bench.score(who, sizes[who], requests[name])
                times.append(spent)
        result = agreement(requests[name], answers[OURS], answers[THEIRS])
        middle = {who: statistics.median(times) for who, times in seconds.items()}
        report["tasks"][name] = {
            **result,
            "seconds": seconds,
            "questions_per_second": {
                who: result["num_questions"] / value for who, value in middle.items()
            },
            "speedup": middle[THEIRS] / middle[OURS],
        }
        print(name, report["tasks"][name])
    report |= {
        "base_model": arguments.base_model,
        "dtype": arguments.dtype,
        "limit": arguments.limit,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "versions": {
            name: version(name) for name in ("loraloom", "torch", "transformers", "lm-eval")
        },
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
