"""Held-out rows of a data set, encoded as training would encode them, and their losses.

A row's loss is the sum over the tokens that training would learn from, in nats; an adapter's is the
sum over all rows by the number of those tokens, as `eval/loss` in metrics.jsonl.

A pair's margin is log p(chosen) - log p(rejected), each summed over its tokens. A reward margin is
β × the adapter's margin less the base model's, as in DPO, and the loss is DPO's, the mean of
-log σ(reward margin).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from loraloom.config.data import SourceConfig
from loraloom.config.fields import checked
from loraloom.data.encoding import SourceEncoder
from loraloom.data.sources import find_location, is_data_file, sha256
from loraloom.data.tokens import Example, count_labels
from loraloom.errors import ConfigError, DataError
from loraloom.eval.results import Metric, PairedComparison, TaskResult
from loraloom.eval.score import Scores
from loraloom.eval.statistics import (
    compare_losses,
    ratio_intervals,
    ratio_stderr,
    seed_values,
    wilson_interval,
)
from loraloom.models.host import Host
from loraloom.training.settings import DpoConfig, TrainConfig

_SUFFIXES = re.compile(r"(\.(json|jsonl|csv|txt|parquet))?(\.gz)?$", re.IGNORECASE)

MAX_LENGTH = TrainConfig.model_fields["max_length"].default
"""Longest row in tokens, as in training by default."""

BETA = DpoConfig.model_fields["beta"].default

MAX_EXPONENT = 89
"""Loss from which on a perplexity, 4e38, says nothing."""


@dataclass(frozen=True)
class HeldOutSet:
    """Rows of a data set.

    Args:
        name: What results call it.
        rows: The examples of each row that has any, of which a long text has several. A pair is
            two rows, the chosen and the rejected answer.
        places: Of those rows in the data set, from 0.
        details: What is noted of it: format, numbers of rows and tokens, hashes.
    """

    name: str
    rows: list[list[Example]]
    places: list[int]
    details: dict[str, Any]

    @property
    def has_pairs(self) -> bool:
        """Whether rows are the two answers of preference pairs in turn."""
        return self.details["format"] == "preference"

    @property
    def num_tokens(self) -> list[int]:
        """Tokens of each row that have a loss."""
        return [sum(map(count_labels, examples)) for examples in self.rows]

    def describe(self) -> str:
        """Say in a line what is measured, and what became of rows that don't fit."""
        details, kind = self.details, "pairs" if self.has_pairs else "rows"
        line = f"{self.name}: {details['num_examples']} {kind}, "
        line += f"{details['num_tokens']} tokens with a loss"
        if details["num_cut"]:
            line += (
                f"; {details['num_cut']} cut or divided to fit max_length={details['max_length']}"
            )
        if details["num_empty"]:
            line += f"; {details['num_empty']} skipped, their answer is empty"
        if details["num_dropped"]:
            line += f"; {details['num_dropped']} dropped, their answer is missing or does not fit"
        return line


def load_held_out(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    data: SourceConfig | Mapping[str, Any],
    max_length: int | None = None,
    limit: int | None = None,
    beta: float = BETA,
) -> HeldOutSet:
    """Read and encode a data set as training would; arguments and errors as in `evaluate_loss`."""
    source = parse_source(data)
    positions = host.config.max_position_embeddings
    longest = min(MAX_LENGTH, positions) if max_length is None else max_length
    if longest > positions:
        raise ConfigError(f"max_length must be at most the model's {positions}, got {longest}")
    split = source.split or "validation"
    loaded = SourceEncoder(source, tokenizer, longest).load(split, limit)
    encoded = loaded.rows
    rows = [list(filter(count_labels, row.pieces)) for row in encoded]
    places = [place for place, examples in enumerate(rows) if examples]
    kept = [rows[place] for place in places]
    if not kept:
        raise DataError(f"{loaded.name}: none of the {len(encoded)} rows has an answer that fits")
    details = {
        "format": source.format or source.scoring,
        "split": None if is_data_file(Path(source.dataset or "")) else split,
        "num_examples": len(kept),
        "num_tokens": sum(count_labels(one) for examples in kept for one in examples),
        "num_cut": sum(row.is_cut for row in encoded),
        "num_empty": loaded.num_empty,
        "num_dropped": len(rows) - len(kept) - loaded.num_empty,
        "max_length": longest,
        "examples_sha256": _digest(kept),
        "source": _describe_source(source, split, loaded.name),
    }
    if source.format == "preference":  # whose answers are rows of their own
        kept = [[answer] for pair in kept for answer in pair]
        places = [place for place in places for _ in range(2)]
        details["beta"] = beta
    return HeldOutSet(data_set_name(source.dataset or loaded.name), kept, places, details)


def parse_source(settings: SourceConfig | Mapping[str, Any]) -> SourceConfig:
    """Check the settings of a data set."""
    return checked(SourceConfig, settings)


def data_set_name(dataset: str) -> str:
    """Give a file's name without the suffixes of its type, or the last part of another path."""
    name = Path(dataset).name
    return _SUFFIXES.sub("", name) or name or dataset


def _digest(rows: Sequence[Sequence[Example]]) -> str:
    tokens = [[[one.input_ids, one.labels] for one in examples] for examples in rows]
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def _describe_source(source: SourceConfig, split: str, name: str) -> dict[str, Any]:
    """The file that was read, with its hash, or what the data set is called."""
    if source.dataset is None:
        return {"dataset": name}
    found = find_location(source.dataset, split, source.config)
    if isinstance(found, Path):
        return {"file": str(found), "sha256": sha256(found)}
    return {"dataset": source.dataset}


@dataclass(frozen=True)
class HeldOutLosses(Scores):
    """How well adapters predict held-out rows: losses of each, summed over its tokens, in nats."""

    metric: ClassVar[Metric] = "loss"
    data: HeldOutSet

    @property
    @override
    def values(self) -> Mapping[str, Sequence[int | float]]:
        return self.scores

    @override
    def compare(self, first: str, second: str) -> PairedComparison:
        losses = (seed_values(self.scores, name) for name in (first, second))
        return compare_losses(*losses, self.data.num_tokens)

    @override
    def results(self) -> dict[str, TaskResult]:
        lengths = np.asarray(self.data.num_tokens, dtype=np.float64)
        sums = np.column_stack([np.asarray(losses) for losses in self.scores.values()])
        num_tokens = sum(self.data.num_tokens)
        results: dict[str, TaskResult] = {}
        for name, column, interval in zip(
            self.scores, sums.T, ratio_intervals(sums, lengths), strict=True
        ):
            loss = math.fsum(self.scores[name]) / num_tokens
            results[name] = {
                "loss": loss,
                "stderr": ratio_stderr(column, lengths),
                "interval": list(interval),
                "perplexity": math.exp(loss) if loss < MAX_EXPONENT else None,
                "num_examples": len(lengths),
                "num_tokens": num_tokens,
                "split": self.details["split"],
            }
        return results

    @override
    def lines(self) -> Iterator[dict[str, Any]]:
        for name, losses in self.scores.items():
            rows = zip(self.data.places, losses, self.data.num_tokens, strict=True)
            for place, loss, count in rows:
                row = {"dataset": self.name, "adapter": name, "index": place}
                yield {**row, "loss": loss, "num_tokens": count}


@dataclass(frozen=True)
class PairLosses(Scores):
    """Whether adapters rank chosen answers above rejected ones; rows are the two in turn.

    `reference` are the base model's losses.
    """

    data: HeldOutSet
    reference: Sequence[float]

    @property
    @override
    def values(self) -> Mapping[str, Sequence[int | float]]:
        return {name: (_margins(of) > 0).tolist() for name, of in self.scores.items()}

    @override
    def results(self) -> dict[str, TaskResult]:
        return {name: self._result(name) for name in self.scores}

    def _result(self, name: str) -> TaskResult:
        margins, right = self._reward_margins(name), self.values[name]
        losses = np.logaddexp(0, -margins)
        values = np.column_stack([losses, margins])
        ones, count = np.ones(len(margins)), len(margins)
        (loss_interval, margin_interval), accuracy = ratio_intervals(values, ones), fmean(right)
        return {
            "loss": float(losses.mean()),
            "stderr": ratio_stderr(losses, ones),
            "interval": list(loss_interval),
            "accuracy": accuracy,
            "accuracy_interval": list(wilson_interval(accuracy, count)),
            "reward_accuracy": fmean(margins > 0),
            "reward_margin": fmean(margins),
            "reward_margin_stderr": ratio_stderr(margins, ones),
            "reward_margin_interval": list(margin_interval),
            "num_examples": count,
            "num_tokens": sum(self.data.num_tokens),
            "split": self.details["split"],
        }

    @override
    def lines(self) -> Iterator[dict[str, Any]]:
        for name, losses in self.scores.items():
            answers = zip(losses[0::2], losses[1::2], self._reward_margins(name), strict=True)
            for place, (chosen, rejected, margin) in zip(
                self.data.places[0::2], answers, strict=True
            ):
                yield {
                    "dataset": self.name,
                    "adapter": name,
                    "index": place,
                    "correct": chosen < rejected,
                    "chosen_log_prob": -chosen,
                    "rejected_log_prob": -rejected,
                    "reward_margin": float(margin),
                }

    def _reward_margins(self, name: str) -> np.ndarray:
        difference = _margins(self.scores[name]) - _margins(self.reference)
        return self.details["beta"] * difference


def _margins(losses: Sequence[float]) -> np.ndarray:
    """Subtract log p(rejected) from log p(chosen) of each pair."""
    log_probs = -np.asarray(losses, dtype=np.float64)
    return log_probs[0::2] - log_probs[1::2]
