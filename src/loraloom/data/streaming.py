"""Data sets that are read on and on while a job learns, without ever being there as a whole.

Rows come in blocks: as many as `shuffle_buffer` says, of each source its share, shuffled together
by the job's seed and the block's number. A block is a function of its position, so a run that goes
on from one gets the same examples. Where there are several ranks, all read the rows and each
encodes a part of them. A source that ends begins again.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count, islice
from typing import Any, final

from transformers import PreTrainedTokenizerBase

from loraloom.config.data import DataConfig, SourceConfig
from loraloom.data.encoding import EncodedRow, Piece
from loraloom.data.examples import TrainingExample
from loraloom.data.locations import StreamState, stream_rows
from loraloom.data.rows import Row
from loraloom.data.sources import check_encoded, encode_rows, load_source
from loraloom.data.training_set import examples_digest, number_row
from loraloom.errors import DataError
from loraloom.ranks import Ranks

MAX_BLOCKS = 4
"""That are kept: jobs with the same data may stand in several."""


@dataclass(frozen=True)
class SourcePlace:
    """Where a source is read on.

    Args:
        passes: How often it was read to its end.
        state: Of its stream; None: from the beginning.
    """

    passes: int = 0
    state: StreamState | None = None


@dataclass(frozen=True)
class StreamPosition:
    """Where a job stands in its streams.

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

    It keeps no place: jobs with the same data and seed share it. Where they are at the same place,
    they share what was read.

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
        ranks: Ranks,
        *,
        as_pairs: bool = False,
    ):
        self.seed = seed
        self.validation = _load_validation(config, tokenizer, max_length, as_pairs=as_pairs)
        self.warnings: tuple[str, ...] = ()
        self._max_length, self._rows_per_example = max_length, 1 + as_pairs
        self._tokenizer = tokenizer
        self._ranks = ranks
        numbers = _rows_of_block(config)
        self._sources = [_Source(*pair) for pair in zip(config.sources, numbers, strict=True)]
        self.report = tuple(
            f"{source.name}: a stream, read {source.rows_per_block} rows at a time"
            for source in self._sources
        )
        first_id = sum(len(example.rows) for example in self.validation)
        self.start = StreamPosition(0, 0, first_id, tuple(SourcePlace() for _ in self._sources))
        self._blocks: dict[int, Block] = {}
        self.take(self.start, 1)

    @property
    def digest(self) -> str:
        """Hash of the first block, of what is measured, and of the sizes of local files."""
        sizes = [dict(source.sizes) for source in self._sources]
        return examples_digest(self.block(self.start).examples, self.validation, repr(sizes))

    def block_digest(self, position: StreamPosition) -> str:
        """Hash of the block of a position."""
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
        size = self._ranks.size
        parts = list(
            self._ranks.spread(
                range(size),
                partial(self._encode_part, position, num_parts=size),
                makes_forwards=False,
            )
        )
        sample_ids = count(position.first_id)
        examples = [
            example
            for place, source in enumerate(self._sources)
            for part in parts
            for row in part["rows"][place]
            for example in number_row(_encoded(*row), sample_ids, source.config.expert_group)
        ]
        first_id = position.first_id + sum(len(example.rows) for example in examples)
        random.Random(f"block {position.block} of seed {self.seed}").shuffle(examples)
        sources = tuple(SourcePlace(**place) for place in parts[0]["places"])
        return Block(tuple(examples), StreamPosition(position.block + 1, 0, first_id, sources))

    def _encode_part(
        self, position: StreamPosition, part: int, *, num_parts: int
    ) -> dict[str, list[Any]]:
        """Read a block, and encode one of several parts of each source's rows, in plain values."""
        rows, places = [], []
        for source, place in zip(self._sources, position.sources, strict=True):
            read, after = source.read(place)
            start, stop = (len(read) * edge // num_parts for edge in (part, part + 1))
            encoded = source.encode(read[start:stop], self._tokenizer, self._max_length)
            rows.append([_plain(row) for row in encoded])
            places.append(asdict(after))
        return {"rows": rows, "places": places}


@final
class _Source:
    """A stream with its first row, and an iterator where it was read last."""

    def __init__(self, config: SourceConfig, rows_per_block: int):
        assert config.dataset is not None, "only data sets are streamed"
        self.config, self.name, self.rows_per_block = config, config.dataset, rows_per_block
        self._stream = stream_rows(config.dataset, config.split or "train", config.config)
        self.sizes = self._stream.sizes
        self._rows = self._stream.rows()
        self._place: SourcePlace | None = SourcePlace()
        first = next(self._rows, None)
        if first is None:
            raise DataError(f"{self.name}: there are no rows")
        self._first = first
        self._rewind(SourcePlace())

    def read(self, place: SourcePlace) -> tuple[list[Row], SourcePlace]:
        """Read the rows of a block from a place on, and tell the place after them."""
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

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> list[EncodedRow]:
        """Encode some rows."""
        if not rows:
            return []
        encoded = encode_rows(self.config, rows, self._first, tokenizer, max_length)
        check_encoded(self.config, rows, encoded)
        return encoded

    def _read_on(self, number: int) -> list[Row]:
        """Read so many rows, or those that are left; where it ends or fails is no known place."""
        self._place = None
        return list(islice(self._rows, number))

    def _rewind(self, place: SourcePlace) -> None:
        self._rows = self._stream.rows(place.state)
        self._place = place


def _rows_of_block(config: DataConfig) -> list[int]:
    """How many rows of each source a block has, by the sources' weights."""
    assert config.shuffle_buffer is not None, "a stream has one"
    total = sum(source.weight for source in config.sources)
    return [
        max(round(config.shuffle_buffer * source.weight / total), 1) for source in config.sources
    ]


def _load_validation(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, max_length: int, *, as_pairs: bool
) -> list[TrainingExample]:
    if config.validation is None:
        return []
    source = load_source(config.validation, tokenizer, max_length, "validation", as_pairs=as_pairs)
    sample_ids = count()
    return [example for row in source.rows for example in number_row(row, sample_ids)]


def _plain(row: EncodedRow) -> tuple[bool, list[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """What ranks tell each other of a row."""
    return row.is_pair, [(piece.input_ids, piece.labels) for piece in row.pieces]


def _encoded(is_pair: bool, pieces: Sequence[tuple[Sequence[int], Sequence[int]]]) -> EncodedRow:
    return EncodedRow(
        tuple(Piece(tuple(ids), tuple(labels)) for ids, labels in pieces), is_pair=is_pair
    )
