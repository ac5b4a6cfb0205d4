"""Held-out loss: how well the base model and its adapters predict rows.

evaluation = evaluate_loss(host, tokenizer, {"dataset": "held_out.jsonl", "format": "chat"})
evaluation.results["math"]["held_out"]["perplexity"]

A row's loss is the sum over the tokens that training would learn from, in nats; an adapter's is the
sum over all rows by the number of those tokens, as `eval/loss` in metrics.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import SourceConfig
from loraloom.config.objective import DpoConfig
from loraloom.data.examples import NO_LOSS, Example
from loraloom.data.tokenising import TokenPair
from loraloom.errors import ConfigError, not_finite
from loraloom.eval.cache import ScoreCache, Tokens
from loraloom.eval.comparison import (
    Comparison,
    Pair,
    adjusted,
    check_scored,
    choose_pairs,
    members_of,
    seed_groups,
)
from loraloom.eval.held_out import HeldOutSet, load_held_out
from loraloom.eval.loss_tables import loss_tables, losses_csv
from loraloom.eval.pairs import PairLosses, is_of_pairs
from loraloom.eval.progress import EvaluationProgress
from loraloom.eval.protocol import score_kept
from loraloom.eval.provenance import describe_evaluation
from loraloom.eval.results import BASE
from loraloom.eval.routing import RoutingTally, summarise_routing
from loraloom.eval.statistics import (
    PairedComparison,
    compare_losses,
    ratio_intervals,
    ratio_stderr,
)
from loraloom.eval.writing import as_document, write_evaluation
from loraloom.infer.rows import example_row
from loraloom.models.host import Host

MAX_EXPONENT = 89
"""Loss from which on a perplexity, 4e38, says nothing."""


@dataclass(frozen=True)
class HeldOutLosses:
    """The loss of every row of a data set by adapter, summed over its tokens, in nats."""

    data: HeldOutSet
    losses: Mapping[str, Sequence[float]]

    def of(self, name: str) -> list[float]:
        """Losses of an adapter, or the mean of a group of seeds."""
        members = members_of(name, list(self.losses))
        return [fmean(seeds) for seeds in zip(*(self.losses[one] for one in members), strict=True)]

    def loss(self, name: str) -> float:
        """The loss a token."""
        return math.fsum(self.losses[name]) / sum(self.data.num_tokens)

    def compare(self, first: str, second: str) -> PairedComparison:
        """Compare two contestants by their losses of rows."""
        return compare_losses(self.of(first), self.of(second), self.data.num_tokens)

    def summarise(self) -> dict[str, dict[str, Any]]:
        """Results by adapter, as in the JSON file."""
        lengths = np.asarray(self.data.num_tokens, dtype=np.float64)
        sums = np.column_stack([np.asarray(losses) for losses in self.losses.values()])
        intervals = ratio_intervals(sums, lengths)
        return {
            name: {
                "loss": self.loss(name),
                "stderr": ratio_stderr(column, lengths),
                "interval": list(interval),
                "perplexity": perplexity(self.loss(name)),
                "num_examples": len(lengths),
                "num_tokens": int(lengths.sum()),
                "split": self.data.details["split"],
            }
            for name, column, interval in zip(self.losses, sums.T, intervals, strict=True)
        }

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield a line for each adapter and row: its loss, summed over its tokens."""
        for name, losses in self.losses.items():
            rows = zip(self.data.places, losses, self.data.num_tokens, strict=True)
            for place, loss, count in rows:
                row = {"dataset": self.data.name, "adapter": name, "index": place}
                yield {**row, "loss": loss, "num_tokens": count}


@dataclass(frozen=True)
class LossEvaluation:
    """What an evaluation of held-out loss gave.

    Args:
        losses: Of each data set.
        comparisons: Adapters compared on the same rows.
        details: What stands beside `results` in the JSON file.
    """

    losses: list[HeldOutLosses | PairLosses]
    comparisons: list[Comparison]
    details: dict[str, Any]

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Losses by adapter (`base` is the base model) and data set, as in the JSON file."""
        results: dict[str, dict[str, Any]] = {}
        for one in self.losses:
            for name, summary in one.summarise().items():
                results.setdefault(name, {})[one.data.name] = summary
        return results

    @property
    def seeds(self) -> dict[str, dict[str, Any]]:
        """Adapters `NAME@SEED` summed up over seeds."""
        names = list(self.losses[0].losses)
        return {
            stem: {
                "adapters": members,
                "tasks": {one.data.name: _spread(one, members) for one in self.losses},
            }
            for stem, members in seed_groups(names).items()
        }

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield a line for each data set, adapter and row."""
        return chain.from_iterable(one.lines() for one in self.losses)

    def tables(self) -> list[Table]:
        """Make every table that there is something for, in the order to show them."""
        return loss_tables(self.results, self.seeds, self.comparisons)

    def write(self, path: str | Path) -> None:
        """Write a .json, .csv or .md file; see `write_evaluation`."""
        write_evaluation(
            Path(path), self.to_json(), self.tables(), lambda: losses_csv(self.results)
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as it stands in the JSON file."""
        return as_document(self.results, self.seeds, self.comparisons, self.details)


def evaluate_loss(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    data: SourceConfig | Mapping[str, Any] | Sequence[HeldOutSet],
    adapters: Sequence[str | None] | None = None,
    *,
    max_length: int | None = None,
    limit: int | None = None,
    beta: float = DpoConfig.model_fields["beta"].default,
    pairs: Sequence[Pair] | None = None,
    cache: ScoreCache | None = None,
    max_tokens_per_batch: int | None = None,
    progress: EvaluationProgress | None = None,
    sources: Mapping[str, str] | None = None,
    command: str = "",
) -> LossEvaluation:
    """Compute the loss of several adapters on held-out rows, all in one pass, and compare them.

    Args:
        host: With the adapters.
        tokenizer: The base model's.
        data: As under `data:` in a run file, `{"dataset": ..., "format": ...}` or `{"task": ...}`;
            or a list of what `load_held_out` gives. Preference pairs are ranked; see `PairLosses`.
        adapters: Names; None is the base model. By default the base model and all on the host.
        max_length: Longest row in tokens; None for the default of training, or what the model
            takes if that is less.
        limit: Most rows to take from the beginning.
        beta: Of preference pairs: what DPO multiplies log-ratios to the base model with.
        pairs: Whom to compare; see `choose_pairs` for the default.
        cache: Losses that are known, and where new ones are kept.
        max_tokens_per_batch: As in `evaluate`; so are the following ones.
        progress: Shows how it gets on.
        sources: Directory or hub id of adapters by name, to be noted with their hashes.
        command: What started it, to be noted.

    Raises:
        ConfigError: If the data set's settings are wrong.
        DataError: If it is missing or damaged, or no row fits.
        AdapterError: If the host lacks an adapter, or its losses are not finite.
    """
    names = [None, *host.adapters] if adapters is None else list(adapters)
    pairs = choose_pairs(names) if pairs is None else pairs
    check_scored(names, pairs)
    sets = (
        [load_held_out(host, tokenizer, data, max_length, limit, beta)]
        if isinstance(data, SourceConfig | Mapping)
        else list(data)
    )
    if not sets:
        raise ConfigError("data must have a data set at least, got none")
    tally = RoutingTally(host, names, tokenizer)
    losses = [
        _score(host, one, names, max_tokens_per_batch, progress, cache, tally) for one in sets
    ]
    num_rows = {one.name: len(one.rows) for one in sets}
    details = {
        "routing": summarise_routing(tally, tokenizer, num_rows),
        **describe_evaluation(host, sources or {}, (), command),
        "tasks": {one.name: one.details for one in sets},
        "num_cached_scores": 0 if cache is None else cache.num_found,
    }
    return LossEvaluation(losses, compare_rows(losses, pairs), details)


def _score(
    host: Host,
    data: HeldOutSet,
    names: Sequence[str | None],
    max_tokens_per_batch: int | None,
    progress: EvaluationProgress | None,
    cache: ScoreCache | None,
    tally: RoutingTally,
) -> HeldOutLosses | PairLosses:
    asked = [None, *names] if is_of_pairs(data) and None not in names else names
    scores = score_kept(
        host,
        [[example_row(one) for one in examples] for examples in data.rows],
        [_known_by(examples) for examples in data.rows],
        asked,
        max_tokens_per_batch,
        progress and progress.start(data.name, data.num_tokens, "rows"),
        cache,
        tally.of(data.name),
    )
    losses = {
        name or BASE: [-scores[name, place][0] for place in range(len(data.rows))] for name in asked
    }
    for name in asked:
        _check_finite(name, losses[name or BASE], data)
    of_names = {name or BASE: losses[name or BASE] for name in names}
    if is_of_pairs(data):
        return PairLosses(data, of_names, losses[BASE])
    return HeldOutLosses(data, of_names)


def _known_by(examples: Sequence[Example]) -> Tokens:
    """What a row's kept loss is known by: no question has NO_LOSS in a context, so none is it."""
    return [TokenPair([NO_LOSS, *one.input_ids], list(one.labels)) for one in examples]


def _check_finite(name: str | None, losses: Sequence[float], data: HeldOutSet) -> None:
    for place, loss in zip(data.places, losses, strict=True):
        if not math.isfinite(loss):
            raise not_finite("losses", loss, [name], f"in row {place + 1} of {data.name}")


def perplexity(loss: int | float) -> float | None:
    """Compute exp(loss); None where that is no number any more."""
    return math.exp(loss) if loss < MAX_EXPONENT else None


def _spread(one: HeldOutLosses | PairLosses, members: Sequence[str]) -> dict[str, Any]:
    losses = [one.loss(name) for name in members]
    return {"mean": fmean(losses), "sd": stdev(losses), "num_seeds": len(losses)}


def compare_rows(
    losses: Sequence[HeldOutLosses | PairLosses], pairs: Sequence[Pair]
) -> list[Comparison]:
    """Compare adapters on the same rows of each data set, and adjust all p-values together."""
    found = [(one.data.name, *pair, one.compare(*pair)) for one in losses for pair in pairs]
    of_pairs = {one.data.name for one in losses if is_of_pairs(one.data)}
    return [
        replace(one, metric="accuracy" if one.task in of_pairs else "loss")
        for one in adjusted(found)
    ]
