"""What adapters answer, computed for all of them in the same batches.

lm-eval evaluates one model at a time. So what one adapter is asked is computed for all adapters at
once, and kept until each of the others is asked the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from itertools import product
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from loraloom.data.tokenising import TokenPair
from loraloom.errors import AdapterError
from loraloom.eval.provenance import adapter_digest
from loraloom.eval.results import BASE
from loraloom.infer.generate import complete
from loraloom.infer.sampling import SamplingConfig
from loraloom.infer.scoring import (
    PairScore,
    group_rows,
    score_groups,
    token_batches,
    tokens_per_batch,
)
from loraloom.models.host import Host

_TOKENS_BESIDE_CONTEXT = 512
"""Most tokens of continuations in one row; attention's cost is quadratic in a row."""

OnProgress = Callable[[int], Any]
"""Told how many different answers are there by now."""


Tokens = tuple[int, ...]


class ScoreRequest(NamedTuple):
    """A continuation that is to be scored after its context, both at least one token."""

    context: Tokens
    continuation: Tokens


class CompletionRequest(NamedTuple):
    """A prompt that is to be completed."""

    input_ids: Tokens
    sampling: SamplingConfig
    draw: int


class Answers:
    """Answers of several adapters on a host."""

    def __init__(
        self,
        host: Host,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Sequence[str | None],
        max_tokens_per_batch: int | None = None,
        batch_size: int = 16,
    ):
        if not adapters:
            raise AdapterError("adapters must name at least one, or None for the base, got none")
        self.host = host
        self.tokenizer = tokenizer
        self.adapters = list(dict.fromkeys(adapters))
        self._max_tokens = max_tokens_per_batch or tokens_per_batch(host)
        self._batch_size = batch_size
        self._kept: dict[str | None, dict[Any, Any]] = {name: {} for name in self.adapters}
        self._weights = {name: self._weights_of(name) for name in self.adapters}

    def score(
        self, adapter: str | None, requests: Sequence[ScoreRequest], on_progress: OnProgress
    ) -> list[PairScore]:
        """Score continuations with an adapter, each different one once."""
        return self._answer(adapter, requests, self._score, on_progress)

    def complete(
        self, adapter: str | None, requests: Sequence[CompletionRequest], on_progress: OnProgress
    ) -> list[str]:
        """Complete prompts with an adapter; see `score`."""
        return self._answer(adapter, requests, self._complete, on_progress)

    def _answer(
        self,
        adapter: str | None,
        requests: Sequence[Any],
        compute: Callable[[list[Any], OnProgress], None],
        on_progress: OnProgress,
    ) -> list[Any]:
        """Take what is kept for an adapter, after computing what is missing for all."""
        self._forget_outdated()
        kept, distinct = self._kept[adapter], list(dict.fromkeys(requests))
        missing = [request for request in distinct if request not in kept]
        num_kept = len(distinct) - len(missing)
        if missing:
            compute(missing, lambda num_done: on_progress(num_kept + num_done))
        answers = {request: kept.pop(request) for request in distinct}
        return [answers[request] for request in requests]

    def _score(self, requests: list[ScoreRequest], on_progress: OnProgress) -> None:
        groups = _group_by_context(requests)
        rows = group_rows(
            self.host,
            [[TokenPair(*map(list, request)) for request in group] for group in groups],
        )
        num_done = 0
        with self.host.prepared():
            for places in token_batches(rows, self._max_tokens // len(self.adapters)):
                wanted = list(product(self.adapters, places))
                scores = score_groups(self.host, rows, wanted, self._max_tokens)
                for (name, place), of_group in zip(wanted, scores, strict=True):
                    self._kept[name].update(zip(groups[place], of_group, strict=True))
                num_done += sum(len(groups[place]) for place in places)
                on_progress(num_done)

    def _complete(self, requests: list[CompletionRequest], on_progress: OnProgress) -> None:
        num_done = 0
        for sampling in dict.fromkeys(request.sampling for request in requests):
            chosen = [request for request in requests if request.sampling == sampling]
            rows = list(product(chosen, self.adapters))
            completions = complete(
                self.host,
                self.tokenizer,
                [list(request.input_ids) for request, _ in rows],
                [name for _, name in rows],
                sampling,
                keys=[request.draw for request, _ in rows],
                batch_size=self._batch_size,
                on_progress=lambda done, before=num_done: on_progress(
                    before + done // len(self.adapters)
                ),
            )
            for (request, name), completion in zip(rows, completions, strict=True):
                self._kept[name][request] = completion.text
            num_done += len(chosen)

    def _forget_outdated(self) -> None:
        """Forget what adapters answered before their weights changed."""
        for name in self.adapters:
            weights = self._weights_of(name)
            if weights != self._weights[name]:
                self._kept[name].clear()
                self._weights[name] = weights

    def _weights_of(self, name: str | None) -> Hashable:
        """What changes when an adapter's weights do, or another adapter takes its name."""
        if name is None:
            return BASE
        adapter = self.host.adapter(name)
        return weakref.ref(adapter), adapter_digest(adapter)


def _group_by_context(requests: Sequence[ScoreRequest]) -> list[list[ScoreRequest]]:
    """Put continuations of the same context together, as many as a row should hold."""
    groups: list[list[ScoreRequest]] = []
    open_groups: dict[Tokens, tuple[list[ScoreRequest], int]] = {}
    for request in requests:
        group, num_tokens = open_groups.get(request.context, ([], 0))
        num_tokens += len(request.continuation)
        if not group or num_tokens > _TOKENS_BESIDE_CONTEXT:
            group, num_tokens = [], len(request.continuation)
            groups.append(group)
        group.append(request)
        open_groups[request.context] = group, num_tokens
    return groups
