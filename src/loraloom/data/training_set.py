"""What a job learns from and what it is measured on, and the order of each epoch."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import nlargest
from itertools import count

from transformers import PreTrainedTokenizerBase

from loraloom.config.data import DataConfig
from loraloom.data.encoding import LoadedSource, SourceEncoder
from loraloom.data.tokens import EncodedRow, PreferencePair, TrainingExample
from loraloom.errors import DataError


@dataclass(frozen=True)
class Portion:
    """The examples of one source, from `start` to `stop`, and how often an epoch has each."""

    start: int
    stop: int
    weight: float

    @property
    def num_draws(self) -> int:
        """Examples of this source in an epoch."""
        return max(round(self.weight * (self.stop - self.start)), 1)


@dataclass(frozen=True)
class TrainingSet:
    """Examples to learn from, others held out, and what happened to the rows on the way.

    `report` has a line for each source, and `warnings` one where examples are both learnt and held
    out.
    """

    examples: list[TrainingExample]
    validation: list[TrainingExample]
    portions: tuple[Portion, ...]
    report: tuple[str, ...]
    seed: int
    warnings: tuple[str, ...] = ()

    @property
    def epoch_length(self) -> int:
        """Examples in an epoch."""
        return sum(portion.num_draws for portion in self.portions)

    @cached_property
    def digest(self) -> str:
        """Hash of all examples as the model gets them."""
        return examples_digest(self.examples, self.validation)

    def longest(self, number: int) -> list[tuple[int, ...]]:
        """Return the tokens of the rows of so many examples, those with the longest rows."""
        lengths = (tuple(len(row.input_ids) for row in one.rows) for one in self.examples)
        return nlargest(number, lengths, key=max)

    def epoch_order(self, epoch: int) -> list[int]:
        """Indices into `examples` in the order of an epoch, shuffled anew in each.

        A source of weight w has round(w × its examples) places: all its examples as many times as
        fit, and for the rest a part that is drawn anew in each epoch.
        """
        generator = random.Random(f"epoch {epoch} of seed {self.seed}")
        order: list[int] = []
        for portion in self.portions:
            indices = range(portion.start, portion.stop)
            times, rest = divmod(portion.num_draws, len(indices))
            order += [*indices] * times + generator.sample(indices, rest)
        generator.shuffle(order)
        return order


def examples_digest(
    examples: Sequence[TrainingExample], validation: Sequence[TrainingExample] = (), more: str = ""
) -> str:
    """Hash examples as the model gets them, and some text."""
    digest = hashlib.sha256(f"{len(examples)} and {len(validation)}{more}".encode())
    for example in (*examples, *validation):
        for row in example.rows:
            digest.update(array("q", (len(row.input_ids), *row.input_ids, *row.labels)))
    return digest.hexdigest()


def load_training_set(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    seed: int,
    *,
    as_pairs: bool = False,
) -> TrainingSet:
    """Read and encode a job's data, and hold out what it is measured on."""
    sources = [
        SourceEncoder(source, tokenizer, max_length, as_pairs).load("train")
        for source in config.sources
    ]
    examples: list[TrainingExample] = []
    validation: list[TrainingExample] = []
    portions, report, sample_ids = [], [], count()
    for source, settings in zip(sources, config.sources, strict=True):
        chosen = choose_held_out(source.name, source.rows, config.validation_fraction, seed)
        start, num_held_out = len(examples), len(validation)
        for index, row in enumerate(source.rows):
            side = validation if index in chosen else examples
            side += number_row(row, sample_ids, settings.expert_group)
        portions.append(Portion(start, len(examples), settings.weight))
        report.append(_describe(source, examples[start:], validation[num_held_out:], max_length))
    if config.validation is not None:
        encoder = SourceEncoder(config.validation, tokenizer, max_length, as_pairs)
        source = encoder.load("validation")
        validation += [one for row in source.rows for one in number_row(row, sample_ids)]
        report.append(_describe(source, [], validation, max_length))
    warnings = _warn_of_repeats(examples, validation)
    return TrainingSet(examples, validation, tuple(portions), tuple(report), seed, warnings)


def number_row(
    row: EncodedRow, sample_ids: Iterator[int], expert_group: int = 0
) -> Sequence[TrainingExample]:
    """Make examples of a row, each with the next sample id."""
    examples = [
        replace(piece, sample_id=next(sample_ids), expert_group=expert_group)
        for piece in row.pieces
    ]
    return [PreferencePair(*examples)] if row.is_pair else examples


def choose_held_out(
    name: str, rows: Sequence[EncodedRow], fraction: float, seed: int
) -> frozenset[int]:
    """Indices of the held-out rows: those with the lowest seeded hashes of their tokens.

    Rows that are equal have equal hashes and stay together, so that none is learnt and measured.
    """
    if fraction == 0:
        return frozenset()
    hashes = {index: _row_hash(row, seed) for index, row in enumerate(rows) if row.pieces}
    ordered = sorted(hashes.values())
    threshold = ordered[max(round(fraction * len(ordered)), 1) - 1]
    chosen = frozenset(index for index, value in hashes.items() if value <= threshold)
    if len(chosen) == len(hashes):
        raise DataError(
            f"{name}: validation_fraction={fraction} of {len(hashes)} rows leaves nothing to learn "
            "from; give more rows, a lower fraction or validation data of their own"
        )
    return chosen


def _row_hash(row: EncodedRow, seed: int) -> bytes:
    tokens = " ".join(str(token) for piece in row.pieces for token in piece.input_ids)
    return hashlib.sha256(f"{seed}: {tokens}".encode()).digest()


def _describe(
    source: LoadedSource,
    examples: Sequence[TrainingExample],
    held_out: Sequence[TrainingExample],
    max_length: int,
) -> str:
    tokens = sum(len(row.input_ids) for example in examples for row in example.rows)
    kind = "pairs" if any(row.is_pair for row in source.rows) else "examples"
    line = (
        f"{source.name}: {len(source.rows)} rows, {len(examples)} {kind}, {tokens} tokens, "
        f"{len(held_out)} held out"
    )
    if cut := sum(row.is_cut for row in source.rows):
        line += f"; {cut} cut or divided to fit max_length={max_length}"
    if empty := source.num_empty:
        line += f"; {empty} skipped, their answer is empty"
    if dropped := sum(not row.pieces for row in source.rows) - empty:
        line += f"; {dropped} dropped, their answer does not fit"
    return line


def _warn_of_repeats(
    examples: Sequence[TrainingExample], validation: Sequence[TrainingExample]
) -> tuple[str, ...]:
    """Warn of held-out examples that are learnt too, as if the validation file was trained on."""
    learnt = {row.input_ids for example in examples for row in example.rows}
    held_out = [row.input_ids for example in validation for row in example.rows]
    repeated = sum(tokens in learnt for tokens in held_out)
    if not repeated:
        return ()
    return (
        f"warning: {repeated} of {len(held_out)} held-out examples are learnt too; eval/loss shows "
        "how well they are remembered",
    )
