"""What adapters answer, computed for all of them in the same batches.

lm-eval evaluates one model at a time. So what one adapter is asked is computed for all adapters at
once, and kept until each of the others is asked the same.
"""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from loraloom.data.tokenising import TokenPair
from loraloom.errors import AdapterError
from loraloom.eval.identity import adapter_digest
from loraloom.eval.likelihoods import PairScore, evaluating, iter_pair_scores
from loraloom.eval.results import BASE
from loraloom.infer.generate import complete
from loraloom.infer.sampling import SamplingConfig
from loraloom.models.host import Host

_TOKENS_BESIDE_CONTEXT = 512
"""Most tokens of continuations in one row; attention's cost is quadratic in a row."""

OnProgress = Callable[[int], Any]
"""Told how many different answers are there by now."""


class Completion(NamedTuple):
    """A completion that is asked for.

    Args:
        input_ids: The prompt.
        sampling: How tokens are chosen.
        draw: Tells apart prompts that are drawn more than once; 0 for all where nothing is drawn.
    """

    input_ids: list[int]
    sampling: SamplingConfig
    draw: int


class Answers:
    """Answers of several adapters on a host.

    Args:
        host: With the adapters.
        tokenizer: The base model's.
        adapters: Names; None is the base model.
        max_tokens_per_batch: Tokens of a batch of log-likelihoods; see `iter_pair_scores`.
        batch_size: Most rows of a batch that generates.

    Raises:
        AdapterError: If the host lacks an adapter, or none is named.
    """

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
        self._max_tokens = max_tokens_per_batch
        self._batch_size = batch_size
        self._kept: dict[str | None, dict[Hashable, Any]] = {name: {} for name in self.adapters}
        self._weights = {name: self._weights_of(name) for name in self.adapters}

    def score(
        self, adapter: str | None, pairs: Sequence[TokenPair], on_progress: OnProgress
    ) -> list[PairScore]:
        """Score continuations with an adapter, each different one once.

        Args:
            adapter: One of `adapters`.
            pairs: Contexts and continuations that fit the model.
            on_progress: Told after each batch.
        """
        keys = [(_packed(pair.context), _packed(pair.continuation)) for pair in pairs]
        asked = dict(zip(keys, pairs, strict=True))
        return self._answer(adapter, keys, asked, self._score, on_progress)

    def complete(
        self, adapter: str | None, prompts: Sequence[Completion], on_progress: OnProgress
    ) -> list[str]:
        """Complete prompts with an adapter; see `score`."""
        keys = [(_packed(ids), sampling, draw) for ids, sampling, draw in prompts]
        asked = dict(zip(keys, prompts, strict=True))
        return self._answer(adapter, keys, asked, self._complete, on_progress)

    def _answer(
        self,
        adapter: str | None,
        keys: Sequence[Hashable],
        asked: dict[Any, Any],
        compute: Callable[[dict[Any, Any], OnProgress], None],
        on_progress: OnProgress,
    ) -> list[Any]:
        """Take what is kept for an adapter, after computing what is missing for all."""
        self._forget_outdated()
        kept = self._kept[adapter]
        missing = {key: value for key, value in asked.items() if key not in kept}
        num_kept = len(asked) - len(missing)
        if missing:
            compute(missing, lambda num_done: on_progress(num_kept + num_done))
        answers = [kept[key] for key in keys]
        for key in asked:
            del kept[key]
        return answers

    def _score(self, missing: dict[Hashable, TokenPair], on_progress: OnProgress) -> None:
        groups = _group_by_context(missing)
        pairs = [[missing[key] for key in group] for group in groups]
        num_done = 0
        for places, scores in iter_pair_scores(self.host, pairs, self.adapters, self._max_tokens):
            for name, by_group in zip(self.adapters, scores, strict=True):
                for place, by_pair in zip(places, by_group, strict=True):
                    self._kept[name].update(zip(groups[place], by_pair, strict=True))
            num_done += sum(len(groups[place]) for place in places)
            on_progress(num_done)

    def _complete(self, missing: dict[Hashable, Completion], on_progress: OnProgress) -> None:
        by_sampling: dict[SamplingConfig, list[Hashable]] = {}
        for key, prompt in missing.items():
            by_sampling.setdefault(prompt.sampling, []).append(key)
        num_done = 0
        for sampling, keys in by_sampling.items():
            rows = [(key, name) for key in keys for name in self.adapters]
            with evaluating(self.host):
                texts = complete(
                    self.host,
                    self.tokenizer,
                    [missing[key].input_ids for key, _ in rows],
                    [name for _, name in rows],
                    sampling,
                    keys=[missing[key].draw for key, _ in rows],
                    batch_size=self._batch_size,
                    on_progress=lambda done, _, before=num_done: on_progress(
                        before + done // len(self.adapters)
                    ),
                )
            for (key, name), text in zip(rows, texts, strict=True):
                self._kept[name][key] = text
            num_done += len(keys)

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


def _packed(ids: Sequence[int]) -> bytes:
    return array("l", ids).tobytes()


def _group_by_context(pairs: dict[Hashable, TokenPair]) -> list[list[Hashable]]:
    """Put continuations of the same context together, as many as a row should hold."""
    groups: list[list[Hashable]] = []
    open_groups: dict[bytes, tuple[list[Hashable], int]] = {}
    for key, pair in pairs.items():
        context, num_tokens = _packed(pair.context), len(pair.continuation)
        group, num_taken = open_groups.get(context, ([], 0))
        if not group or num_taken + num_tokens > _TOKENS_BESIDE_CONTEXT:
            group, num_taken = [], 0
            groups.append(group)
        group.append(key)
        open_groups[context] = group, num_taken + num_tokens
    return groups
