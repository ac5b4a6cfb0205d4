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
    """Rows with their indices; long texts are several, pairs a chosen and a rejected in turn."""

    name: str
    rows: list[list[Example]]
    row_indices: list[int]
    details: dict[str, Any]

    @property
    def has_pairs(self) -> bool:
        return self.details["format"] == "preference"

    @property
    def num_tokens(self) -> list[int]:
        return [sum(map(count_labels, examples)) for examples in self.rows]


def describe_rows(name: str, details: Mapping[str, Any]) -> str:
    kind = "pairs" if details["format"] == "preference" else "rows"
    size = f"{details['num_examples']} {kind}, {details['num_tokens']} tokens with a loss"
    return "; ".join([f"{name}: {size}", *details["notes"]])


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
    rows: list[list[Example]] = []
    row_indices: list[int] = []
    for index, row in enumerate(encoded):
        examples = list(filter(count_labels, row.pieces))
        if examples:
            rows.append(examples)
            row_indices.append(index)
    tokens = [[[row.input_ids, row.labels] for row in examples] for examples in rows]
    name = source.dataset or encoder.name
    location = source.dataset and find_location(source.dataset, split, source.config)
    details = {
        "format": source.format or source.scoring or find_task(str(source.task)).config.scoring,
        "split": None if is_data_file(Path(source.dataset or "")) else split,
        "num_examples": len(rows),
        "num_tokens": sum(count_labels(row) for examples in rows for row in examples),
        "notes": encoder.notes(encoded),
        "max_length": longest,
        "examples_sha256": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
        "source": describe(location) if location else {"dataset": name},
    }
    if source.format == "preference":  # whose answers are rows of their own
        rows = [[answer] for pair in rows for answer in pair]
        row_indices = [index for index in row_indices for _ in range(2)]
        details["beta"] = beta
    return HeldOutSet(data_set_name(name), rows, row_indices, details)


def data_set_name(dataset: str) -> str:
    """Give a file's name without the suffixes of its type, or the last part of another path."""
    name = Path(dataset).name
    return _SUFFIXES.sub("", name) or name or dataset


def row_scores(data: HeldOutSet, losses: Mapping[str, Sequence[float]]) -> Scores:
    """Sum up how well adapters predict rows: losses of each, summed over its tokens, in nats."""
    row_tokens = data.num_tokens
    num_tokens = sum(row_tokens)
    lengths = np.asarray(row_tokens, dtype=np.float64)
    sums = np.column_stack(list(losses.values()))
    # of all adapters from the same resamples: ten thousand draws are what takes time
    intervals = ratio_intervals(sums, lengths)
    scores = Scores(data.name, data.details, "loss", row_tokens)
    for column, (name, row_losses) in enumerate(losses.items()):
        loss = math.fsum(row_losses) / num_tokens
        scores.values[name] = row_losses
        scores.results[name] = {
            "loss": loss,
            "stderr": ratio_stderr(sums[:, column], lengths),
            "interval": list(intervals[column]),
            "perplexity": math.exp(loss) if loss < MAX_EXPONENT else None,
            "num_examples": len(lengths),
            "num_tokens": num_tokens,
            "split": data.details["split"],
        }
        for index, row_loss, length in zip(data.row_indices, row_losses, row_tokens, strict=True):
            line = {
                "dataset": data.name,
                "adapter": name,
                "index": index,
                "loss": row_loss,
                "num_tokens": length,
            }
            scores.lines.append(line)
    return scores


def pair_scores(
    data: HeldOutSet, losses: Mapping[str, Sequence[float]], reference: Sequence[float]
) -> Scores:
    """How often adapters rank chosen answers above rejected ones, which are rows in turn."""
    reference_margins = _margins(reference)
    scores = Scores(data.name, data.details)
    for name, row_losses in losses.items():
        margins = _margins(row_losses)
        rewards = data.details["beta"] * (margins - reference_margins)
        correct = (margins > 0).tolist()
        scores.values[name] = correct
        scores.results[name] = _pair_result(data, correct, rewards)
        for pair, reward in enumerate(rewards.tolist()):
            chosen_loss, rejected_loss = row_losses[2 * pair : 2 * pair + 2]
            line = {
                "dataset": data.name,
                "adapter": name,
                "index": data.row_indices[2 * pair],
                "correct": correct[pair],
                "chosen_log_prob": -chosen_loss,
                "rejected_log_prob": -rejected_loss,
                "reward_margin": reward,
            }
            scores.lines.append(line)
    return scores


def _pair_result(data: HeldOutSet, correct: Sequence[bool], rewards: np.ndarray) -> Fields:
    losses = np.logaddexp(0, -rewards)
    ones = np.ones(len(rewards))
    accuracy = fmean(correct)
    loss_interval, reward_interval = ratio_intervals(np.column_stack([losses, rewards]), ones)
    return {
        "loss": float(losses.mean()),
        "stderr": ratio_stderr(losses, ones),
        "interval": list(loss_interval),
        "accuracy": accuracy,
        "accuracy_interval": list(wilson_interval(accuracy, len(rewards))),
        "reward_accuracy": fmean(rewards > 0),
        "reward_margin": fmean(rewards),
        "reward_margin_stderr": ratio_stderr(rewards, ones),
        "reward_margin_interval": list(reward_interval),
        "num_examples": len(rewards),
        "num_tokens": sum(data.num_tokens),
        "split": data.details["split"],
    }


def _margins(losses: Sequence[float]) -> np.ndarray:
    log_probs = -np.asarray(losses, dtype=np.float64)
    return log_probs[0::2] - log_probs[1::2]
