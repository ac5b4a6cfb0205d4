"""Questions on a tiny model, and the plain way to score them: one sequence at a time."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from loraloom.data.tasks import ChoiceQuestion, QuestionSet
from loraloom.data.tokens import encode_pairs
from loraloom.eval.score import QuestionScore, Scores, task_scores
from loraloom.host.host import Host
from tests.tiny import METHODS, tiny_host

VOCAB_SIZE = 300


def scoring_host(family: str = "llama", configs: dict[str, Any] = METHODS, **changes: Any) -> Host:
    """Make a host in float64 for the tiny tokenizer."""
    sizes = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 256}
    return tiny_host(family, configs, **sizes | changes)


def question(
    context: str,
    answers: Sequence[str],
    gold: int = 0,
    index: int = 0,
    group: str | None = None,
    normalizers: Sequence[float] | None = None,
) -> ChoiceQuestion:
    """Make a question whose choices share their context."""
    return ChoiceQuestion(
        task="toy",
        index=index,
        contexts=(context,) * len(answers),
        continuations=tuple(f" {answer}" for answer in answers),
        labels=tuple("ABCDE"[: len(answers)]),
        gold=gold,
        normalizers=tuple(normalizers or [1.0] * len(answers)),
        group=group,
    )


def some_questions() -> list[ChoiceQuestion]:
    """Several lengths, numbers of choices, single tokens, and contexts that differ."""
    apart = question("The red", ["is one", "is one"], gold=1, index=4)
    return [
        question("Question: What color is the sky?\nAnswer:", ["yes", "no", "yes and no"]),
        question("Answer:", ["a", "the", "c", "answer"], gold=2, index=1),
        question("Please choose the correct one", ["a, b and c", "two"], gold=1, index=2),
        question("The sky is", ["blue and green", "blue and red, a sea"], index=3),
        replace(apart, contexts=("The red", "The green one")),
    ]


def toy_scores(
    group: str | None = None,
    task: str = "toy",
    values: Sequence[Sequence[float]] = ((-1.0, -2.0), (-1.0, -2.0)),
    names: Sequence[str] = ("base", "law"),
) -> Scores:
    """Make scores of two questions, of which A and B are the right answers."""
    scores = [
        QuestionScore(question("?", ["x", "y"], gold, gold, group), tuple(value))
        for gold, value in enumerate(values)
    ]
    asked = QuestionSet(task, "test", "text", [score.question for score in scores], {})
    return task_scores(asked, dict.fromkeys(names, scores))


def record_forwards(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Give the shapes of the tokens of all forwards to come."""
    shapes, hidden = [], Host.hidden

    def recorded(self: Host, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        shapes.append(ids.shape)
        return hidden(self, ids, *args, **options)

    monkeypatch.setattr(Host, "hidden", recorded)
    return shapes


def limit_rows(monkeypatch: pytest.MonkeyPatch, most: int) -> list[int]:
    """Let the end of a forward of more rows run out of memory; give the rows of the others."""
    seen, rows, hidden, scored = [], 0, Host.hidden, Host.token_scores

    def counted(self: Host, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        nonlocal rows
        rows = len(ids)
        return hidden(self, ids, *args, **options)

    def limited(self: Host, *args: Any) -> Any:
        if rows > most:
            raise torch.OutOfMemoryError
        seen.append(rows)
        return scored(self, *args)

    monkeypatch.setattr(Host, "hidden", counted)
    monkeypatch.setattr(Host, "token_scores", limited)
    return seen


@torch.no_grad()
def plain_score(
    host: Host, adapter: str | None, context: list[int], continuation: list[int]
) -> float:
    """Score a continuation by itself: no batch, no padding, all logits."""
    ids = torch.tensor([context + continuation])
    scored = host(ids[:, :-1], adapters=[adapter]).logits[0].log_softmax(-1)[-len(continuation) :]
    return float(scored.gather(1, torch.tensor(continuation)[:, None]).sum())


def plain_log_likelihoods(
    host: Host, tokenizer: Any, asked: ChoiceQuestion, adapter: str | None
) -> list[float]:
    """Score each choice by itself."""
    pairs = encode_pairs(tokenizer, list(zip(asked.contexts, asked.continuations, strict=True)))
    return [plain_score(host, adapter, *pair) for pair in pairs]
