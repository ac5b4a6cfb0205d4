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
from functools import cached_property, lru_cache
from itertools import count, islice
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from loraloom.config.data import SHUFFLE_BUFFER, DataConfig
from loraloom.data.encoding import STREAM_ROWS, SourceEncoder
from loraloom.data.sources import Row, fields_of_all
from loraloom.data.tokens import EncodedRow, Example, PreferencePair, TrainingExample
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

    @property
    def epoch_length(self) -> int:
        return sum(portion.num_draws for portion in self.portions)

    @cached_property
    def digest(self) -> str:
        return examples_digest(self.examples, self.validation)

    @property
    def longest(self) -> int:
        return max((len(row.input_ids) for row in _rows_of(self.examples)), default=0)

    def epoch_order(self, epoch: int) -> list[int]:
        """Indices into `examples`; in each epoch another order, and another part of a source."""
        generator = random.Random(f"epoch {epoch} of seed {self.seed}")
        order: list[int] = []
        for portion in self.portions:
            indices = range(portion.start, portion.stop)
            num_passes, num_left = divmod(portion.num_draws, len(indices))
            order += [*indices] * num_passes + generator.sample(indices, num_left)
        generator.shuffle(order)
        return order


def _rows_of(examples: Sequence[TrainingExample]) -> Iterator[Example]:
    for example in examples:
        yield from example.rows


def examples_digest(
    examples: Sequence[TrainingExample], validation: Sequence[TrainingExample] = (), more: str = ""
) -> str:
    digest = hashlib.sha256(f"{len(examples)} and {len(validation)}{more}".encode())
    for row in _rows_of([*examples, *validation]):
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
    examples = list[TrainingExample]()
    validation = list[TrainingExample]()
    portions = list[Portion]()
    report = list[str]()
    sample_ids = count()
    for settings in config.sources:
        source = SourceEncoder(settings, tokenizer, max_length, as_pairs)
        rows = source.load("train")
        held_out = choose_held_out(source.name, rows, config.validation_fraction, seed)
        learned = list[TrainingExample]()
        measured = list[TrainingExample]()
        for index, row in enumerate(rows):
            side = measured if index in held_out else learned
            side += _number(row, sample_ids, settings.expert_group)
        start = len(examples)
        portions.append(Portion(start, start + len(learned), settings.weight))
        report.append(_describe(source, rows, learned, measured))
        examples += learned
        validation += measured
    if config.validation is not None:
        source = SourceEncoder(config.validation, tokenizer, max_length, as_pairs)
        rows = source.load("validation")
        for row in rows:
            validation += _number(row, sample_ids)
        report.append(_describe(source, rows, [], validation))
    return TrainingSet(examples, validation, tuple(portions), tuple(report), seed)


def _number(row: EncodedRow, ids: Iterator[int], group: int = 0) -> Sequence[TrainingExample]:
    examples = [replace(piece, sample_id=next(ids), expert_group=group) for piece in row.pieces]
    return [PreferencePair(*examples)] if row.is_pair else examples


def choose_held_out(name: str, rows: Sequence[EncodedRow], fraction: float, seed: int) -> set[int]:
    """Indices of the held-out rows: those with the lowest seeded hashes of their tokens."""
    if fraction == 0:
        return set()
    # equal rows have equal hashes and stay together, so that none is both learned and measured
    equal_rows = defaultdict[bytes, list[int]](list)
    for index, row in enumerate(rows):
        if row.pieces:
            tokens = " ".join(str(token) for piece in row.pieces for token in piece.input_ids)
            digest = hashlib.sha256(f"{seed}: {tokens}".encode()).digest()
            equal_rows[digest].append(index)
    num_rows = sum(map(len, equal_rows.values()))
    max_rows = max(round(fraction * num_rows), 1)
    chosen: set[int] = set()
    groups = [equal_rows[digest] for digest in sorted(equal_rows)]
    groups.sort(key=lambda group: len(group) > max_rows)
    for group in groups:
        if not chosen or len(chosen) + len(group) <= max_rows:
            chosen.update(group)
    if len(chosen) == num_rows:
        fault = f"validation_fraction={fraction} of {num_rows} rows leaves nothing to learn from"
        raise DataError(f"{name}: {fault}; add rows, lower validation_fraction, or set validation")
    return chosen


def _describe(
    source: SourceEncoder,
    rows: Sequence[EncodedRow],
    examples: Sequence[TrainingExample],
    held_out: Sequence[TrainingExample],
) -> str:
    num_tokens = sum(len(row.input_ids) for row in _rows_of(examples))
    kind = "pairs" if any(row.is_pair for row in rows) else "examples"
    counts = [
        f"{len(rows)} rows",
        f"{len(examples)} {kind}",
        f"{num_tokens} tokens",
        f"{len(held_out)} held out",
    ]
    return "; ".join([f"{source.name}: {', '.join(counts)}", *source.notes(rows)])


@dataclass(frozen=True)
class SourcePosition:
    """Where a source is read on: how often it was read to its end, and from which row."""

    passes: int = 0
    row: int = 0


@dataclass(frozen=True)
class StreamPosition:
    """Where a job is in its streams: how much of a block it has taken."""

    block: int
    taken: int  # of the block's examples
    first_id: int  # sample id of the block's first example; ids go up for ever
    sources: tuple[SourcePosition, ...]  # where each is read at the block's beginning

    @property
    def passes(self) -> int:
        return min(source.passes for source in self.sources)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> StreamPosition:
        sources = tuple(SourcePosition(**source) for source in values["sources"])
        return cls(**{**values, "sources": sources})  # ty: ignore[invalid-argument-type]


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
        self.longest = max_length
        self.validation: list[TrainingExample] = []
        sample_ids = count()
        if config.validation is not None:
            encoder = SourceEncoder(config.validation, tokenizer, max_length, as_pairs)
            for row in encoder.load("validation"):
                self.validation += _number(row, sample_ids)
        rows_of_block = config.shuffle_buffer or SHUFFLE_BUFFER  # null may be written too
        total = sum(source.weight for source in config.sources)
        self._sources: list[_Source] = []
        for source in config.sources:
            num_rows = max(round(rows_of_block * source.weight / total), 1)
            encoder = SourceEncoder(source, tokenizer, max_length)
            self._sources.append(_Source(encoder, num_rows))
        positions = (SourcePosition(),) * len(self._sources)
        self.start = StreamPosition(0, taken=0, first_id=next(sample_ids), sources=positions)
        self._read_block = lru_cache(maxsize=MAX_BLOCKS)(self._make_block)
        self.take(self.start, 1)
        self.report = tuple(source.describe() for source in self._sources)

    @property
    def digest(self) -> str:
        sizes = [dict(source.stream.sizes) for source in self._sources]
        return examples_digest(self.block(self.start).examples, self.validation, repr(sizes))

    def block(self, position: StreamPosition) -> Block:
        return self._read_block(replace(position, taken=0))

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
                fault = f"no row has an answer that fits max_length={self.longest}"
                raise DataError(f"{names}: {fault}; raise max_length, or fill in empty answers")
            stop = position.taken + number - len(examples)
            examples += block.examples[position.taken : stop]
            position = replace(position, taken=stop) if stop < len(block.examples) else block.next
        return examples, position

    def _make_block(self, position: StreamPosition) -> Block:
        # ids go up for ever, as a sample's dropout is drawn by its id
        sample_ids = count(position.first_id)
        examples = list[TrainingExample]()
        next_sources = list[SourcePosition]()
        for source, start in zip(self._sources, position.sources, strict=True):
            rows, stop = source.read(start)
            for row in rows:
                examples += _number(row, sample_ids, source.expert_group)
            next_sources.append(stop)
        # seeded by the block's number, as no state of a generator would survive a resume elsewhere
        generator = random.Random(f"block {position.block} of seed {self.seed}")
        generator.shuffle(examples)
        next_position = StreamPosition(
            block=position.block + 1,
            taken=0,
            first_id=next(sample_ids),
            sources=tuple(next_sources),
        )
        return Block(tuple(examples), next_position)


@final
class _Source:
    """A stream with its first rows' fields, and an iterator where it was read last."""

    def __init__(self, encoder: SourceEncoder, rows_per_block: int):
        self.name = encoder.name
        self.expert_group = encoder.config.expert_group
        self._encoder = encoder
        self._rows_per_block = rows_per_block
        self.stream = encoder.open("train")
        num_first = max(rows_per_block, STREAM_ROWS)
        self._fields = fields_of_all([*islice(self.stream.rows(), num_first)])
        self._rows: Iterator[Row] = iter(())
        self._notes: list[str] = []
        self._position: SourcePosition | None = None

    def describe(self) -> str:
        line = f"{self.name}: a stream, read {self._rows_per_block} rows at a time"
        return "; of the first, ".join([line, *self._notes])

    def read(self, position: SourcePosition) -> tuple[list[EncodedRow], SourcePosition]:
        if position != self._position:
            self._rows = self.stream.rows(position.row)
        # unknown where the stream ends or fails
        self._position = None
        passes = position.passes
        rows = list(islice(self._rows, self._rows_per_block))
        next_row = position.row + len(rows)
        while len(rows) < self._rows_per_block:
            passes += 1
            self._rows = self.stream.rows()
            more = list(islice(self._rows, self._rows_per_block - len(rows)))
            next_row = len(more)
            rows += more
        self._position = SourcePosition(passes, next_row)
        encoded = self._encoder.encode(rows, self._fields)
        self._encoder.check(rows, encoded)
        self._notes = self._notes or self._encoder.notes(encoded)
        return encoded, self._position
