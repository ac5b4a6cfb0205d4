"""What a job learns from and what it is measured on: data sets as a whole, or streams.

A stream's rows come in blocks of `shuffle_buffer` rows, of each source its share, shuffled by seed
and block number: a run that resumes gets the same examples. A source that ends begins again.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, islice
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from loraloom.config.data import SHUFFLE_BUFFER, DataConfig
from loraloom.data.encoding import STREAM_ROWS, SourceEncoder
from loraloom.data.sources import Row, StreamState, fields_of_all
from loraloom.data.tokens import EncodedRow, PreferencePair, TrainingExample
from loraloom.errors import DataError

# Blocks that are kept: jobs with the same data may be in several.
MAX_BLOCKS = 4


@dataclass(frozen=True)
class Portion:
    """The examples of one source, from `start` to `stop`, and how often an epoch has each."""

    start: int
    stop: int
    weight: float

    @property
    def num_draws(self) -> int:
        return max(round(self.weight * (self.stop - self.start)), 1)


@dataclass(frozen=True)
class TrainingSet:
    """Examples to learn from, others held out, and a line for each source on what became of it."""

    examples: list[TrainingExample]
    validation: list[TrainingExample]
    portions: tuple[Portion, ...]
    report: tuple[str, ...]
    seed: int
    warnings: tuple[str, ...] = ()

    @property
    def epoch_length(self) -> int:
        return sum(portion.num_draws for portion in self.portions)

    @cached_property
    def digest(self) -> str:
        return examples_digest(self.examples, self.validation)

    @property
    def longest(self) -> int:
        return max((len(row.input_ids) for one in self.examples for row in one.rows), default=0)

    def epoch_order(self, epoch: int) -> list[int]:
        """Indices into `examples`; in each epoch another order, and another part of a source."""
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
    examples, validation = list[TrainingExample](), list[TrainingExample]()
    portions, report, sample_ids = [], [], count()
    for settings in config.sources:
        source = SourceEncoder(settings, tokenizer, max_length, as_pairs)
        rows = source.load("train")
        chosen = choose_held_out(source.name, rows, config.validation_fraction, seed)
        start, num_held_out = len(examples), len(validation)
        for index, row in enumerate(rows):
            side = validation if index in chosen else examples
            side += number_row(row, sample_ids, settings.expert_group)
        portions.append(Portion(start, len(examples), settings.weight))
        report.append(_describe(source, rows, examples[start:], validation[num_held_out:]))
    if config.validation is not None:
        source = SourceEncoder(config.validation, tokenizer, max_length, as_pairs)
        rows = source.load("validation")
        validation += [one for row in rows for one in number_row(row, sample_ids)]
        report.append(_describe(source, rows, [], validation))
    # what is learned too measures memory, as where the validation file was trained on
    learnt = {row.input_ids for example in examples for row in example.rows}
    repeats = [any(row.input_ids in learnt for row in example.rows) for example in validation]
    what = f"{sum(repeats)} of {len(repeats)} held-out examples are training examples too"
    warning = f"warning: {what}; eval/loss shows how well they are remembered"
    warnings = (warning,) if any(repeats) else ()
    return TrainingSet(examples, validation, tuple(portions), tuple(report), seed, warnings)


def number_row(row: EncodedRow, ids: Iterator[int], group: int = 0) -> Sequence[TrainingExample]:
    examples = [replace(x, sample_id=next(ids), expert_group=group) for x in row.pieces]
    return [PreferencePair(*examples)] if row.is_pair else examples


def choose_held_out(name: str, rows: Sequence[EncodedRow], fraction: float, seed: int) -> set[int]:
    """Indices of the held-out rows: those with the lowest seeded hashes of their tokens."""
    if fraction == 0:
        return set()
    # equal rows have equal hashes and stay together, so that none is both learned and measured
    equals, chosen = defaultdict[bytes, list[int]](list), set[int]()
    for index, row in enumerate(rows):
        tokens = " ".join(str(token) for piece in row.pieces for token in piece.input_ids)
        if row.pieces:
            equals[hashlib.sha256(f"{seed}: {tokens}".encode()).digest()].append(index)
    num_rows = sum(map(len, equals.values()))
    most = max(round(fraction * num_rows), 1)
    for _, group in sorted(equals.items(), key=lambda item: (len(item[1]) > most, item[0])):
        if not chosen or len(chosen) + len(group) <= most:
            chosen |= {*group}
    if len(chosen) == num_rows:
        what = f"validation_fraction={fraction} of {num_rows} rows leaves nothing to learn from"
        raise DataError(f"{name}: {what}; add rows, lower validation_fraction, or set validation")
    return chosen


def _describe(
    source: SourceEncoder,
    rows: Sequence[EncodedRow],
    examples: Sequence[TrainingExample],
    held_out: Sequence[TrainingExample],
) -> str:
    tokens = sum(len(row.input_ids) for example in examples for row in example.rows)
    kind = "pairs" if any(row.is_pair for row in rows) else "examples"
    counts = f"{len(rows)} rows, {len(examples)} {kind}, {tokens} tokens"
    return "; ".join([f"{source.name}: {counts}, {len(held_out)} held out", *source.notes(rows)])


@dataclass(frozen=True)
class SourcePlace:
    """Where a source is read on: how often it was read to its end, and the state of its stream."""

    passes: int = 0
    state: StreamState | None = None


@dataclass(frozen=True)
class StreamPosition:
    """Where a job is in its streams: how much of a block it has taken."""

    block: int
    taken: int  # of the block's examples
    first_id: int  # sample id of the block's first example; ids go up for ever
    sources: tuple[SourcePlace, ...]  # where each is read at the block's beginning

    @property
    def passes(self) -> int:
        return min(source.passes for source in self.sources)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> StreamPosition:
        return cls(**{**values, "sources": tuple(SourcePlace(**one) for one in values["sources"])})


@dataclass(frozen=True)
class Block:
    """Examples that were read and shuffled together, and the position of the next ones."""

    examples: tuple[TrainingExample, ...]
    next: StreamPosition


class StreamedSet:
    """Streams, and what is held out. It keeps no place: jobs with equal data and seed share it."""

    def __init__(
        self,
        config: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        seed: int,
        *,
        as_pairs: bool = False,
    ):
        self.seed = seed
        self.validation: list[TrainingExample] = []
        sample_ids = count()
        if config.validation is not None:
            encoder = SourceEncoder(config.validation, tokenizer, max_length, as_pairs)
            held_out = encoder.load("validation")
            self.validation += [one for row in held_out for one in number_row(row, sample_ids)]
        self.warnings: tuple[str, ...] = ()
        self.longest = max_length
        rows_of_block = config.shuffle_buffer or SHUFFLE_BUFFER  # null may be written too
        total = sum(source.weight for source in config.sources)
        self._sources = []
        for source in config.sources:
            num_rows = max(round(rows_of_block * source.weight / total), 1)
            self._sources.append(_Source(SourceEncoder(source, tokenizer, max_length), num_rows))
        self.start = StreamPosition(0, 0, next(sample_ids), (SourcePlace(),) * len(self._sources))
        self._blocks: dict[int, Block] = {}
        self.take(self.start, 1)
        self.report = tuple(
            f"{source.name}: a stream, read {source.rows_per_block} rows at a time"
            + "".join(f"; of the first, {note}" for note in source.notes)
            for source in self._sources
        )

    @property
    def digest(self) -> str:
        sizes = [dict(source.sizes) for source in self._sources]
        return examples_digest(self.block(self.start).examples, self.validation, repr(sizes))

    def block(self, position: StreamPosition) -> Block:
        block = self._blocks.pop(position.block, None) or self._read_block(position)
        self._blocks = {**dict(list(self._blocks.items())[1 - MAX_BLOCKS :]), position.block: block}
        return block

    def take(
        self, position: StreamPosition, number: int
    ) -> tuple[list[TrainingExample], StreamPosition]:
        examples: list[TrainingExample] = []
        last_passes = position.passes
        while len(examples) < number:
            block = self.block(position)
            if block.examples:
                last_passes = block.next.passes
            elif block.next.passes > last_passes + 1:
                names = ", ".join(source.name for source in self._sources)
                what = f"no row has an answer that fits max_length={self.longest}"
                raise DataError(f"{names}: {what}; raise max_length, or fill in empty answers")
            stop = position.taken + number - len(examples)
            examples += block.examples[position.taken : stop]
            position = replace(position, taken=stop) if stop < len(block.examples) else block.next
        return examples, position

    def _read_block(self, position: StreamPosition) -> Block:
        # ids go up for ever, as a sample's dropout is drawn by its id
        sample_ids = count(position.first_id)
        examples, places = list[TrainingExample](), list[SourcePlace]()
        for source, place in zip(self._sources, position.sources, strict=True):
            rows, after = source.read(place)
            examples += source.encode(rows, sample_ids)
            places.append(after)
        # seeded by the block's number, as no state of a generator would survive a resume elsewhere
        random.Random(f"block {position.block} of seed {self.seed}").shuffle(examples)
        after = StreamPosition(position.block + 1, 0, next(sample_ids), tuple(places))
        return Block(tuple(examples), after)


@final
class _Source:
    """A stream with its first rows' fields, and an iterator where it was read last."""

    def __init__(self, encoder: SourceEncoder, rows_per_block: int):
        self._encoder, self.rows_per_block = encoder, rows_per_block
        self.name = encoder.config.dataset
        self._stream = encoder.open("train", streaming=True)
        self.sizes = self._stream.sizes
        begins = [*islice(self._stream.rows(), max(rows_per_block, STREAM_ROWS))]
        self._first, self._rows, self.notes = fields_of_all(begins), iter(()), list[str]()
        self._place: SourcePlace | None = None

    def read(self, place: SourcePlace) -> tuple[list[Row], SourcePlace]:
        if place != self._place:
            self._rows = self._stream.rows(place.state)
        # unknown where the stream ends or fails
        self._place = None
        rows, passes = list(islice(self._rows, self.rows_per_block)), place.passes
        while len(rows) < self.rows_per_block:
            passes += 1
            self._rows = self._stream.rows()
            rows += islice(self._rows, self.rows_per_block - len(rows))
        self._place = after = SourcePlace(passes, self._stream.state_dict())
        return rows, after

    def encode(self, rows: list[Row], sample_ids: Iterator[int]) -> list[TrainingExample]:
        encoded = self._encoder.encode(rows, self._first)
        self._encoder.check(rows, encoded)
        self.notes = self.notes or self._encoder.notes(encoded)
        group = self._encoder.config.expert_group
        return [one for row in encoded for one in number_row(row, sample_ids, group)]
