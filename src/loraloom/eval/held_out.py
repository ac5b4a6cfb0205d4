"""Held-out rows of a data set, encoded as training would encode them, and their losses.

An adapter's loss is the sum over the tokens that training would learn from, in nats, by their
number. A pair's margin is log p(chosen) - log p(rejected), each summed over its tokens. A reward
margin is β × the adapter's margin less the base model's, and the loss DPO's, -log σ of that.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import BETA, MAX_LENGTH, SourceConfig
from loraloom.config.fields import checked
from loraloom.data.encoding import SourceEncoder
from loraloom.data.sources import describe, find_location, is_data_file
from loraloom.data.tasks import find_task
from loraloom.data.tokens import Example, count_labels
from loraloom.errors import ConfigError
from loraloom.eval.results import Fields, check_limit
from loraloom.eval.score import Scores
from loraloom.eval.statistics import ratio_intervals, ratio_stderr, wilson_interval
from loraloom.host.host import Host

_SUFFIXES = re.compile(r"(\.(json|jsonl|csv|txt|parquet))?(\.gz)?$", re.IGNORECASE)

# Loss from which on a perplexity, 4e38, says nothing.
MAX_EXPONENT = 89


@dataclass(frozen=True)
class HeldOutSet:
    """Rows with their places; long texts are several, pairs a chosen and a rejected in turn."""

    name: str
    rows: list[list[Example]]
    places: list[int]
    details: dict[str, Any]

    @property
    def has_pairs(self) -> bool:
        return self.details["format"] == "preference"

    @property
    def num_tokens(self) -> list[int]:
        return [sum(map(count_labels, examples)) for examples in self.rows]


def describe_rows(name: str, of: Mapping[str, Any]) -> str:
    """Say in a line what of a data set is measured, and what became of rows that don't fit."""
    kind = "pairs" if of["format"] == "preference" else "rows"
    line = f"{name}: {of['num_examples']} {kind}, {of['num_tokens']} tokens with a loss"
    parts = {
        "num_cut": f"cut or divided to fit max_length={of['max_length']}",
        "num_empty": "skipped because of empty answers",
        "num_dropped": "dropped because their answers are missing or do not fit",
    }
    return "; ".join([line, *(f"{of[key]} {what}" for key, what in parts.items() if of[key])])


def load_held_out(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    data: SourceConfig | Mapping[str, Any],
    max_length: int | None = None,
    limit: int | None = None,
    beta: float = BETA,
) -> HeldOutSet:
    """Read and encode a data set as training would; arguments and errors as in `evaluate_loss`."""
    source = checked(SourceConfig, data)
    positions = host.config.max_position_embeddings
    longest = min(MAX_LENGTH, positions) if max_length is None else max_length
    if not 2 <= longest <= positions:
        raise ConfigError(f"max_length must be from 2 to the model's {positions}, got {longest}")
    check_limit(limit)
    split = source.split or "validation"
    encoder = SourceEncoder(source, tokenizer, longest)
    encoded = encoder.load(split, limit)
    rows = [list(filter(count_labels, row.pieces)) for row in encoded]
    places = [place for place, examples in enumerate(rows) if examples]
    kept = [rows[place] for place in places]
    tokens = [[[one.input_ids, one.labels] for one in examples] for examples in kept]
    found = source.dataset and find_location(source.dataset, split, source.config)
    name = source.dataset or encoder.name
    details = {
        "format": source.format or source.scoring or find_task(str(source.task)).config.scoring,
        "split": None if is_data_file(Path(source.dataset or "")) else split,
        "num_examples": len(kept),
        "num_tokens": sum(count_labels(one) for examples in kept for one in examples),
        "num_cut": sum(row.is_cut for row in encoded),
        "num_empty": sum(row.is_empty for row in encoded),
        "num_dropped": len(rows) - len(kept) - sum(row.is_empty for row in encoded),
        "max_length": longest,
        "examples_sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
        "source": describe(found) if found else {"dataset": name},
    }
    if source.format == "preference":  # whose answers are rows of their own
        kept = [[answer] for pair in kept for answer in pair]
        places = [place for place in places for _ in range(2)]
        details["beta"] = beta
    return HeldOutSet(data_set_name(name), kept, places, details)


def data_set_name(dataset: str) -> str:
    """Give a file's name without the suffixes of its type, or the last part of another path."""
    name = Path(dataset).name
    return _SUFFIXES.sub("", name) or name or dataset


def row_scores(data: HeldOutSet, losses: Mapping[str, Sequence[float]]) -> Scores:
    """Sum up how well adapters predict rows: losses of each, summed over its tokens, in nats."""
    lengths = np.asarray(data.num_tokens, dtype=np.float64)
    sums = np.column_stack([np.asarray(of_rows) for of_rows in losses.values()])
    # of all adapters from the same resamples: ten thousand draws are what takes time
    intervals = zip(losses, sums.T, ratio_intervals(sums, lengths), strict=True)
    results: dict[str, Fields] = {}
    for name, column, interval in intervals:
        loss = math.fsum(losses[name]) / sum(data.num_tokens)
        results[name] = {
            "loss": loss,
            "stderr": ratio_stderr(column, lengths),
            "interval": list(interval),
            "perplexity": math.exp(loss) if loss < MAX_EXPONENT else None,
            "num_examples": len(lengths),
            "num_tokens": sum(data.num_tokens),
            "split": data.details["split"],
        }
    lines = [
        {"dataset": data.name, "adapter": n, "index": place, "loss": loss, "num_tokens": count}
        for n, of in losses.items()
        for place, loss, count in zip(data.places, of, data.num_tokens, strict=True)
    ]
    return Scores(data.name, data.details, results, losses, lines, "loss", data.num_tokens)


def pair_scores(
    data: HeldOutSet, losses: Mapping[str, Sequence[float]], reference: Sequence[float]
) -> Scores:
    """How often adapters rank chosen answers above rejected ones, which are rows in turn."""
    margins = {name: _margins(of) for name, of in losses.items()}
    rewards = {n: data.details["beta"] * (of - _margins(reference)) for n, of in margins.items()}
    values = {name: (of > 0).tolist() for name, of in margins.items()}
    results: dict[str, Fields] = {}
    for name, reward in rewards.items():
        loss, ones, accuracy = np.logaddexp(0, -reward), np.ones(len(reward)), fmean(values[name])
        intervals = ratio_intervals(np.column_stack([loss, reward]), ones)
        results[name] = {
            "loss": float(loss.mean()),
            "stderr": ratio_stderr(loss, ones),
            "interval": list(intervals[0]),
            "accuracy": accuracy,
            "accuracy_interval": list(wilson_interval(accuracy, len(reward))),
            "reward_accuracy": fmean(reward > 0),
            "reward_margin": fmean(reward),
            "reward_margin_stderr": ratio_stderr(reward, ones),
            "reward_margin_interval": list(intervals[1]),
            "num_examples": len(reward),
            "num_tokens": sum(data.num_tokens),
            "split": data.details["split"],
        }
    lines = [
        {
            "dataset": data.name,
            "adapter": name,
            "index": place,
            "correct": chosen < rejected,
            "chosen_log_prob": -chosen,
            "rejected_log_prob": -rejected,
            "reward_margin": float(reward),
        }
        for name, of in losses.items()
        for place, chosen, rejected, reward in zip(
            data.places[0::2], of[0::2], of[1::2], rewards[name], strict=True
        )
    ]
    return Scores(data.name, data.details, results, values, lines)


def _margins(losses: Sequence[float]) -> np.ndarray:
    log_probs = -np.asarray(losses, dtype=np.float64)
    return log_probs[0::2] - log_probs[1::2]
