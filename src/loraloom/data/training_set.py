"""What a job learns from and what it is measured on, and the order of each epoch."""

from __future__ import annotations

import hashlib
import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import nlargest
from itertools import chain, count

from transformers import PreTrainedTokenizerBase

from loraloom.config.data import DataConfig
from loraloom.data.encoding import EncodedRow
from loraloom.data.examples import Example, PreferencePair, TrainingExample
from loraloom.data.sources import LoadedSource, load_source
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
        order = [index for portion in self.portions for index in _draw(portion, generator)]
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
        load_source(source, tokenizer, max_length, "train", as_pairs=as_pairs)
        for source in config.sources
    ]
    sample_ids = count()
    shares = [
        _share(source, config.validation_fraction, seed, sample_ids, settings.expert_group)
        for source, settings in zip(sources, config.sources, strict=True)
    ]
    if config.validation is not None:
        validation = load_source(
            config.validation, tokenizer, max_length, "validation", as_pairs=as_pairs
        )
        held_out = [one for row in validation.rows for one in number_row(row, sample_ids)]
        shares.append(_Share(validation, [], held_out))
    stops = [0]
    for share in shares:
        stops.append(stops[-1] + len(share.examples))
    return TrainingSet(
        examples=list(chain.from_iterable(share.examples for share in shares)),
        validation=list(chain.from_iterable(share.held_out for share in shares)),
        portions=tuple(
            Portion(stops[place], stops[place + 1], source.weight)
            for place, source in enumerate(config.sources)
        ),
        report=tuple(_describe(share, max_length) for share in shares),
        warnings=tuple(_warn_of_repeats(shares)),
        seed=seed,
    )


@dataclass(frozen=True)
class _Share:
    """What a source gives to learn from and to be measured on."""

    source: LoadedSource
    examples: list[TrainingExample]
    held_out: list[TrainingExample]


def _share(
    source: LoadedSource, fraction: float, seed: int, sample_ids: Iterator[int], expert_group: int
) -> _Share:
    chosen = choose_held_out(source.name, source.rows, fraction, seed)
    examples = [number_row(row, sample_ids, expert_group) for row in source.rows]
    return _Share(
        source=source,
        examples=[one for index, row in enumerate(examples) if index not in chosen for one in row],
        held_out=[one for index, row in enumerate(examples) if index in chosen for one in row],
    )


def number_row(
    row: EncodedRow, sample_ids: Iterator[int], expert_group: int = 0
) -> Sequence[TrainingExample]:
    """Make examples of a row, each with the next sample id."""
    examples = [
        Example(piece.input_ids, piece.labels, next(sample_ids), expert_group)
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


def _draw(portion: Portion, generator: random.Random) -> list[int]:
    indices = range(portion.start, portion.stop)
    times, rest = divmod(portion.num_draws, len(indices))
    return [*indices] * times + generator.sample(indices, rest)


def _describe(share: _Share, max_length: int) -> str:
    rows = [row for example in share.examples for row in example.rows]
    tokens = sum(len(row.input_ids) for row in rows)
    kind = "pairs" if any(row.is_pair for row in share.source.rows) else "examples"
    line = (
        f"{share.source.name}: {len(share.source.rows)} rows, {len(share.examples)} {kind}, "
        f"{tokens} tokens, {len(share.held_out)} held out"
    )
    if cut := sum(row.is_cut for row in share.source.rows):
        line += f"; {cut} cut or divided to fit max_length={max_length}"
    if empty := share.source.num_empty:
        line += f"; {empty} skipped, their answer is empty"
    if dropped := sum(not row.pieces for row in share.source.rows) - empty:
        line += f"; {dropped} dropped, their answer does not fit"
    return line


def _warn_of_repeats(shares: Sequence[_Share]) -> list[str]:
    """Tell of held-out examples that are learnt too, as if the validation file was trained on."""
    learnt = {row.input_ids for share in shares for one in share.examples for row in one.rows}
    held_out = [row.input_ids for share in shares for one in share.held_out for row in one.rows]
    repeated = sum(tokens in learnt for tokens in held_out)
    if not repeated:
        return []
    return [
        f"warning: {repeated} of {len(held_out)} held-out examples are learnt too; eval/loss shows "
        "how well they are remembered"
    ]
