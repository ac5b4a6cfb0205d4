"""Data sets that are read on and on while a job learns, without ever being there as a whole.

Rows come in blocks: as many as `shuffle_buffer` says, of each source its share, shuffled together
by the job's seed and the block's number. A block is a function of its position, so a run that
resumes from one gets the same examples. A source that ends begins again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from loraloom.config.data import DataConfig
from loraloom.data.encoding import SourceEncoder
from loraloom.data.sources import Row, StreamState
from loraloom.data.tokens import TrainingExample
from loraloom.data.training_set import examples_digest, number_row
from loraloom.errors import DataError

MAX_BLOCKS = 4
"""Blocks that are kept: jobs with the same data may be in several."""


@dataclass(frozen=True)
class SourcePlace:
    """Where a source is read on: how often it was read to its end, and the state of its stream."""

    passes: int = 0
    state: StreamState | None = None


@dataclass(frozen=True)
class StreamPosition:
    """Where a job is in its streams.

    Args:
        block: Number of the block.
        taken: Examples of it that were learnt from.
        first_id: Sample id of its first example; ids go up for ever.
        sources: Where each is read at the block's beginning.
    """

    block: int
    taken: int
    first_id: int
    sources: tuple[SourcePlace, ...]

    @property
    def passes(self) -> int:
        """Passes over the data: how often every source was read to its end."""
        return min(source.passes for source in self.sources)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> StreamPosition:
        """Make a position of what `asdict` made of one."""
        return cls(**{**values, "sources": tuple(SourcePlace(**one) for one in values["sources"])})


@dataclass(frozen=True)
class Block:
    """Examples that were read and shuffled together, and the position of the next ones."""

    examples: tuple[TrainingExample, ...]
    next: StreamPosition


class StreamedSet:
    """A job's streams and what it is measured on.

    It keeps no place: jobs with the same data and seed share it, and what was read.

    Attributes:
        validation: Examples that are measured.
        report: A line for each source.
        start: The first position.
    """

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
            self.validation += [one for row in held_out.rows for one in number_row(row, sample_ids)]
        self.warnings: tuple[str, ...] = ()
        self._max_length, self._rows_per_example = max_length, 1 + as_pairs
        assert config.shuffle_buffer is not None, "a stream has one"
        share = config.shuffle_buffer / sum(source.weight for source in config.sources)
        self._sources = [
            _Source(
                SourceEncoder(source, tokenizer, max_length), max(round(share * source.weight), 1)
            )
            for source in config.sources
        ]
        self.report = tuple(
            f"{source.name}: a stream, read {source.rows_per_block} rows at a time"
            for source in self._sources
        )
        places = tuple(SourcePlace() for _ in self._sources)
        self.start = StreamPosition(0, 0, next(sample_ids), places)
        self._blocks: dict[int, Block] = {}
        self.take(self.start, 1)

    @property
    def digest(self) -> str:
        """Hash of the first block, of what is measured, and of the sizes of local files."""
        sizes = [dict(source.sizes) for source in self._sources]
        return examples_digest(self.block(self.start).examples, self.validation, repr(sizes))

    def block_digest(self, position: StreamPosition) -> str:
        return examples_digest(self.block(position).examples)

    def block(self, position: StreamPosition) -> Block:
        """Read the block of a position; those that were used last are kept."""
        block = self._blocks.pop(position.block, None) or self._read_block(position)
        latest = list(self._blocks.items())[1 - MAX_BLOCKS :]
        self._blocks = {**dict(latest), position.block: block}
        return block

    def take(
        self, position: StreamPosition, number: int
    ) -> tuple[list[TrainingExample], StreamPosition]:
        """Read so many examples on from a position."""
        examples: list[TrainingExample] = []
        last_passes = position.passes
        while len(examples) < number:
            block = self.block(position)
            if block.examples:
                last_passes = block.next.passes
            elif block.next.passes > last_passes + 1:
                raise DataError(
                    f"{', '.join(source.name for source in self._sources)}: no row has an answer "
                    f"that fits max_length={self._max_length}; raise it"
                )
            stop = position.taken + number - len(examples)
            examples += block.examples[position.taken : stop]
            is_left = stop < len(block.examples)
            position = replace(position, taken=stop) if is_left else block.next
        return examples, position

    def longest(self, number: int) -> list[tuple[int, ...]]:
        """Return the tokens of the rows of the longest examples that there may be."""
        return [(self._max_length,) * self._rows_per_example] * number

    def _read_block(self, position: StreamPosition) -> Block:
        sample_ids = count(position.first_id)
        examples: list[TrainingExample] = []
        places: list[SourcePlace] = []
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
    """A stream with its first row, and an iterator where it was read last."""

    def __init__(self, encoder: SourceEncoder, rows_per_block: int):
        self._encoder, self.rows_per_block = encoder, rows_per_block
        self.name = encoder.config.dataset
        self._stream = encoder.open("train", streaming=True)
        self.sizes = self._stream.sizes
        first = next(self._stream.rows(), None)
        if first is None:
            raise DataError(f"{self.name}: there are no rows")
        self._first = first
        self._rewind(SourcePlace())

    def read(self, place: SourcePlace) -> tuple[list[Row], SourcePlace]:
        """Read the rows of a block from a place on, and return the place after them."""
        if place != self._place:
            self._rewind(place)
        rows, passes = self._read_on(self.rows_per_block), place.passes
        while len(rows) < self.rows_per_block:
            passes += 1
            self._rewind(SourcePlace(passes))
            more = self._read_on(self.rows_per_block - len(rows))
            if not more:
                raise DataError(f"{self.name}: there are no rows any more")
            rows += more
        self._place = after = SourcePlace(passes, self._stream.state_dict())
        return rows, after

    def encode(self, rows: list[Row], sample_ids: Iterator[int]) -> list[TrainingExample]:
        encoded = self._encoder.encode(rows, self._first)
        self._encoder.check(rows, encoded)
        group = self._encoder.config.expert_group
        return [one for row in encoded for one in number_row(row, sample_ids, group)]

    def _read_on(self, number: int) -> list[Row]:
        """Read so many rows, or those that are left."""
        self._place = None  # unknown where the stream ends or fails
        return list(islice(self._rows, number))

    def _rewind(self, place: SourcePlace) -> None:
        self._rows = self._stream.rows(place.state)
        self._place: SourcePlace | None = place
