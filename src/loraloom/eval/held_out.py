"""Held-out rows of a data set, encoded as training would encode them, and their losses.

An adapter's loss is the sum over the tokens that training would learn from, in nats, by their
number. A pair is ranked correctly if the chosen answer's log p, summed over its tokens, is higher.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import MAX_LENGTH, SourceConfig, is_data_file
from loraloom.config.fields import checked
from loraloom.data.encoding import SourceEncoder
from loraloom.data.sources import describe, find_location
from loraloom.data.tasks import find_task
from loraloom.data.tokens import NO_LOSS, Example, TokenPair, count_labels
from loraloom.errors import ConfigError
from loraloom.eval.results import BASE
from loraloom.eval.routing import RoutingTally
from loraloom.eval.score import Scorer, Scores, check_finite
from loraloom.eval.statistics import ratio_intervals, ratio_stderr, share_fields
from loraloom.generation.scoring import example_row
from loraloom.host.host import Host
from loraloom.terminal import show_progress

# exp(89) is beyond float32: a larger loss has no perplexity.
MAX_EXPONENT = 89


@dataclass(frozen=True)
class HeldOutSet:
    """Texts of a data set, each in pieces, and the index of its row in the data.

    Of a preference pair, the chosen and the rejected answer are two texts, in turn.
    """

    name: str
    rows: list[list[Example]]
    row_indices: list[int]
    details: dict[str, Any]

    @property
    def has_pairs(self) -> bool:
        return self.details["format"] == "preference"

    @property
    def num_tokens(self) -> list[int]:
        """Count the tokens of each text that have a loss."""
        return [sum(map(count_labels, examples)) for examples in self.rows]


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
        "split": None if is_data_file(source.dataset) else split,
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
    path = Path(dataset)
    if is_data_file(dataset):
        return Path(path.name.removesuffix(".gz")).stem
    return path.name or dataset


def score_rows(data: HeldOutSet, scorer: Scorer, tally: RoutingTally) -> Scores:
    rows = [[example_row(example) for example in examples] for examples in data.rows]
    keys = []
    for examples in data.rows:
        # no question has NO_LOSS in a context, so none is taken for a row
        keys.append([TokenPair([NO_LOSS, *row.input_ids], list(row.labels)) for row in examples])
    rows_per_item = 2 if data.has_pairs else 1
    num_items = len(rows) // rows_per_item
    on_routing = tally.observe(data.name, num_items, rows_per_question=rows_per_item)
    with show_progress(scorer.console, data.name, data.num_tokens) as advance:
        scores = scorer.score(rows, keys, advance, on_routing)
    origins = [f"in row {index + 1} of {data.name}" for index in data.row_indices]
    losses = {}
    for adapter, log_probs in scores.items():
        check_finite("losses", adapter, log_probs, origins)
        losses[adapter or BASE] = [-log_prob for (log_prob,) in log_probs]
    return pair_scores(data, losses) if data.has_pairs else row_scores(data, losses)


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
