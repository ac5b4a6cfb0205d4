"""Held-out rows of a data set, encoded as training would encode them, and their losses.

An adapter's loss is the sum over the tokens that training would learn from, in nats, by their
number. A pair is ranked correctly if the chosen answer's log p, summed over its tokens, is higher.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import MAX_LENGTH, SourceConfig
from loraloom.config.fields import checked
from loraloom.data.encoding import SourceEncoder
from loraloom.data.sources import describe, find_location, is_data_file
from loraloom.data.tasks import find_task
from loraloom.data.tokens import Example, count_labels
from loraloom.errors import ConfigError
from loraloom.eval.results import check_limit
from loraloom.eval.score import Scores
from loraloom.eval.statistics import ratio_intervals, ratio_stderr, share_fields
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


def pair_scores(data: HeldOutSet, losses: Mapping[str, Sequence[float]]) -> Scores:
    """How often adapters rank chosen answers above rejected ones, which are rows in turn."""
    scores = Scores(data.name, data.details)
    for name, row_losses in losses.items():
        correct = []
        pairs = zip(data.row_indices[::2], row_losses[::2], row_losses[1::2], strict=True)
        for index, chosen_loss, rejected_loss in pairs:
            correct.append(chosen_loss < rejected_loss)
            line = {
                "dataset": data.name,
                "adapter": name,
                "index": index,
                "correct": correct[-1],
                "chosen_log_prob": -chosen_loss,
                "rejected_log_prob": -rejected_loss,
            }
            scores.lines.append(line)
        scores.values[name] = correct
        scores.results[name] = share_fields(correct)
        scores.results[name]["num_tokens"] = sum(data.num_tokens)
        scores.results[name]["split"] = data.details["split"]
    return scores
