"""Scoring of given texts by the engine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from loraloom.data.tokenising import TokenPair
from loraloom.generation.failures import log_failure
from loraloom.generation.rows import make_rows
from loraloom.generation.scoring import score_rows
from loraloom.generation.sequence import Failure, Score
from loraloom.models.host import Host


def score_texts(host: Host, batch: Iterable[Score]) -> None:
    """Score texts and tell each one's client, each adapter's together: a fault is its own."""
    parts: dict[str | None, list[Score]] = {}
    for score in batch:
        parts.setdefault(score.request.adapter_name, []).append(score)
    for part in parts.values():
        _score_part(host, part)


def _score_part(host: Host, part: Sequence[Score]) -> None:
    rows = [
        make_rows([TokenPair(list(tokens[:1]), list(tokens[1:]))], shared=False)[0]
        for tokens in (score.request.tokens for score in part)
    ]
    requests = [(score.request.adapter, row) for score, row in zip(part, rows, strict=True)]
    num_top = max(score.request.num_top for score in part)
    try:
        for score, scores in zip(part, score_rows(host, requests, num_top=num_top), strict=True):
            score.tell(scores)
    except Exception as error:
        log_failure("texts could not be scored", error)
        if len(part) == 1:
            part[0].sink(Failure(error))
            return
        for score in part:
            _score_part(host, [score])
