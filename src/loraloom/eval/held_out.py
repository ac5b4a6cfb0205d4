"""Held-out rows of a data set, encoded as training would encode them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import SourceConfig
from loraloom.config.faults import describe_faults
from loraloom.data.encoding import load_source
from loraloom.data.sources import find_location, is_data_file, sha256
from loraloom.data.tokens import Example, count_labels
from loraloom.errors import ConfigError, DataError
from loraloom.models.host import Host
from loraloom.training.settings import DpoConfig, TrainConfig

_SUFFIXES = re.compile(r"(\.(json|jsonl|csv|txt|parquet))?(\.gz)?$", re.IGNORECASE)

MAX_LENGTH = TrainConfig.model_fields["max_length"].default
"""Longest row in tokens, as in training by default."""


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
        told = self.details
        kind = "pairs" if self.has_pairs else "rows"
        line = (
            f"{self.name}: {told['num_examples']} {kind}, {told['num_tokens']} tokens with a loss"
        )
        if told["num_cut"]:
            line += f"; {told['num_cut']} cut or divided to fit max_length={told['max_length']}"
        if told["num_empty"]:
            line += f"; {told['num_empty']} skipped, their answer is empty"
        if told["num_dropped"]:
            line += f"; {told['num_dropped']} dropped, their answer is missing or does not fit"
        return line


def load_held_out(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    data: SourceConfig | Mapping[str, Any],
    max_length: int | None = None,
    limit: int | None = None,
    beta: float = DpoConfig.model_fields["beta"].default,
) -> HeldOutSet:
    """Read and encode a data set as training would; arguments and errors as in `evaluate_loss`."""
    source = parse_source(data)
    positions = host.config.max_position_embeddings
    longest = min(MAX_LENGTH, positions) if max_length is None else max_length
    if longest > positions:
        raise ConfigError(f"max_length must be at most the model's {positions}, got {longest}")
    split = source.split or "validation"
    loaded = load_source(source, tokenizer, longest, split, limit=limit)
    encoded = loaded.rows
    rows = [list(filter(count_labels, row.pieces)) for row in encoded]
    places = [place for place, examples in enumerate(rows) if examples]
    kept = [rows[place] for place in places]
    digest, num_examples, num_dropped = _digest(kept), len(kept), len(rows) - len(kept)
    of_pairs = {}
    if source.format == "preference":  # whose answers are rows of their own
        kept = [[answer] for pair in kept for answer in pair]
        places = [place for place in places for _ in range(2)]
        of_pairs = {"beta": beta}
    if not kept:
        raise DataError(f"{loaded.name}: none of the {len(encoded)} rows has an answer that fits")
    return HeldOutSet(
        name=data_set_name(source.dataset or loaded.name),
        rows=kept,
        places=places,
        details={
            "format": source.format or source.scoring,
            "split": None if is_data_file(Path(source.dataset or "")) else split,
            "num_examples": num_examples,
            "num_tokens": sum(count_labels(one) for examples in kept for one in examples),
            "num_cut": sum(row.is_cut for row in encoded),
            "num_empty": loaded.num_empty,
            "num_dropped": num_dropped - loaded.num_empty,
            "max_length": longest,
            **of_pairs,
            "examples_sha256": digest,
            "source": _describe_source(source, split, loaded.name),
        },
    )


def parse_source(settings: SourceConfig | Mapping[str, Any]) -> SourceConfig:
    """Check the settings of a data set."""
    try:
        return SourceConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError("; ".join(describe_faults(error, (SourceConfig,)))) from error


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
