"""Log-likelihoods of continuations, for several adapters in one pass.

Axes: A adapters, B rows, L tokens, N scored tokens, C continuations, D hidden.

Continuations come in groups, such as the choices of a question. Groups are sorted by length and
batched by tokens; continuations of the same context share a row (rows.py), and a batch holds its
rows once for each adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from loraloom.data.tokenising import TokenPair
from loraloom.eval.rows import TokenRow, collate_rows, make_rows
from loraloom.halving import in_halves
from loraloom.models.host import Host
from loraloom.routing.record import LayerRouting

_TOKENS_PER_BATCH = {"cpu": 1024}
_TOKENS_PER_BATCH_ELSEWHERE = 16384


class PairScore(NamedTuple):
    """What a model makes of a continuation.

    Args:
        log_likelihood: Summed over its tokens.
        is_greedy: Every token of it is the most likely one.
    """

    log_likelihood: float
    is_greedy: bool


GroupScores = list[list[list[PairScore]]]
"""By adapter, group and continuation."""

Groups = Sequence[Sequence[TokenRow]]

TellRouting = Callable[[Sequence[int], Tensor, Mapping[str, Sequence[LayerRouting]]], None]
"""Takes the places of a forward's groups, the real tokens of their rows in turn, and by adapter the
record of their routing."""


def iter_pair_scores(
    host: Host,
    groups: Sequence[Sequence[TokenPair]],
    adapters: Sequence[str | None],
    max_tokens_per_batch: int | None = None,
) -> Iterator[tuple[list[int], GroupScores]]:
    """Score continuations batch by batch, the longest first.

    Args:
        host: With the adapters; dropout is off meanwhile.
        groups: Contexts and continuations that fit the model; a group is never divided.
        adapters: At least one name; None is the base model.
        max_tokens_per_batch: None for `tokens_per_batch`.

    Yields:
        The places of a batch's groups, and their scores.

    Raises:
        AdapterError: If the host lacks an adapter.
        DataError: If a group alone doesn't fit into memory.
    """
    rows = make_all_rows(host, groups)
    budget = max_tokens_per_batch or tokens_per_batch(host)
    for places in token_batches(rows, budget // len(adapters)):
        with evaluating(host):
            scores = score_groups(host, rows, places, adapters, budget)
        yield places, scores


def tokens_per_batch(host: Host) -> int:
    """Tokens of a batch, padding included: 1,024 on a CPU, 16,384 elsewhere."""
    return _TOKENS_PER_BATCH.get(host.device.type, _TOKENS_PER_BATCH_ELSEWHERE)


@contextmanager
def evaluating(host: Host) -> Iterator[None]:
    """Put the host into eval mode without gradients, and back."""
    was_training = host.training
    host.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        host.train(was_training)


def make_all_rows(host: Host, groups: Sequence[Sequence[TokenPair]]) -> list[list[TokenRow]]:
    """Make each group's rows; continuations share one where attention takes a mask of our own.

    transformers leaves such a mask as it is: FlashAttention takes none, and a sliding window would
    be missing from it.
    """
    rows = [make_rows(pairs, shared=True) for pairs in groups]
    longest = max((len(row.input_ids) for shared in rows for row in shared), default=0)
    window = host.config.to_dict().get("sliding_window")
    takes_mask = host.config._attn_implementation in ("sdpa", "eager")
    if takes_mask and (window is None or longest <= window):
        return rows
    return [make_rows(pairs, shared=False) for pairs in groups]


def token_batches(groups: Groups, max_tokens: int) -> Iterator[list[int]]:
    """Cut groups into batches of like lengths; each is a list of places."""
    lengths = [max(len(row.input_ids) for row in rows) for rows in groups]
    batch: list[int] = []
    num_rows = 0
    for place in sorted(range(len(groups)), key=lambda place: -lengths[place]):
        added = len(groups[place])
        if batch and (num_rows + added) * lengths[batch[0]] > max_tokens:
            yield batch
            batch, num_rows = [], 0
        batch.append(place)
        num_rows += added
    if batch:
        yield batch


def score_groups(
    host: Host,
    groups: Groups,
    places: Sequence[int],
    adapters: Sequence[str | None],
    max_tokens: int,
    tell_routing: TellRouting | None = None,
) -> GroupScores:
    """Score the groups at some places, in one forward if that stays within the tokens and fits.

    Adapters are parted first. Groups are parted where memory runs out with a single adapter.

    Args:
        host: In eval mode, without gradients.
        groups: All of them.
        places: Of groups of like lengths.
        adapters: At least one name; None is the base model.
        max_tokens: Of a forward, padding included; of one adapter it may have more.
        tell_routing: Learns of mixtures' routing.

    Raises:
        DataError: If a group alone doesn't fit into memory.
    """

    def describe(place: int) -> str:
        return f"a question of {_count_tokens([groups[place]])} tokens"

    def score(names: Sequence[str | None]) -> GroupScores:
        if len(names) > 1:
            return _score_batch(host, groups, places, names, tell_routing)
        alone = lambda part: _score_batch(host, groups, part, names, tell_routing)[0]  # noqa: E731
        return [in_halves(alone, places, describe)]

    at_once = max(1, max_tokens // _count_tokens([groups[place] for place in places]))
    return [
        of_adapter
        for first in range(0, len(adapters), at_once)
        for of_adapter in in_halves(score, adapters[first : first + at_once], str)
    ]


def _count_tokens(groups: Groups) -> int:
    lengths = [len(row.input_ids) for rows in groups for row in rows]
    return len(lengths) * max(lengths)


def _score_batch(
    host: Host,
    all_groups: Groups,
    places: Sequence[int],
    adapters: Sequence[str | None],
    tell_routing: TellRouting | None,
) -> GroupScores:
    """Score groups in one forward."""
    groups = [all_groups[place] for place in places]
    rows = [row for group in groups for row in group]
    tell = None if tell_routing is None else partial(tell_routing, places)
    log_probs, is_top = _score_rows(host, rows, adapters, tell)
    owners = torch.tensor(_owners(groups))
    sizes = [1 + max(choice for row in rows for choice in row.choices) for rows in groups]
    sums = log_probs.new_zeros(len(adapters), sum(sizes))  # (A, C)
    sums.index_add_(1, owners, log_probs)
    misses = sums.new_zeros(sums.shape).index_add_(1, owners, (~is_top).to(sums.dtype))
    return [
        [
            [PairScore(*pair) for pair in zip(likelihoods, greedy, strict=True)]
            for likelihoods, greedy in zip(
                _cut(by_adapter.tolist(), sizes), _cut(is_greedy.tolist(), sizes), strict=True
            )
        ]
        for by_adapter, is_greedy in zip(sums, misses == 0, strict=True)
    ]


def _cut(values: list, sizes: Sequence[int]) -> list[list]:
    """Cut a list into lists of those sizes."""
    rest = iter(values)
    return [[next(rest) for _ in range(size)] for size in sizes]


def _owners(groups: Groups) -> list[int]:
    """The continuation that each scored token belongs to, counted through all groups."""
    owners, first = [], 0
    for rows in groups:
        choices = [choice for row in rows for choice in row.choices]
        owners += [first + choice for choice in choices]
        first += max(choices) + 1
    return owners


def _score_rows(
    host: Host,
    rows: Sequence[TokenRow],
    adapters: Sequence[str | None],
    tell_routing: Callable[[Tensor, Mapping[str, Sequence[LayerRouting]]], None] | None,
) -> tuple[Tensor, Tensor]:
    """Compute each scored token's log p in float64, and whether it is the likeliest.

    Both are [A, N], on the CPU.
    """
    batch = collate_rows(rows, host.dtype, host.device)
    copies = len(adapters)
    mask = batch.attention_mask
    output = host.hidden(
        batch.input_ids.repeat(copies, 1),
        mask.repeat(copies, *[1] * (mask.dim() - 1)),
        [name for name in adapters for _ in rows],
        token_mask=batch.token_mask.repeat(copies, 1),
        position_ids=batch.position_ids.repeat(copies, 1),
    )
    hidden_states = output.last_hidden_state
    by_adapter = hidden_states.view(copies, -1, hidden_states.shape[-1])  # (A, B L, D)
    states = by_adapter[:, batch.predictors].flatten(0, 1)  # (A N, D)
    log_probs, is_top = host.token_scores(states, batch.targets.repeat(copies))
    if tell_routing is not None and output.routing:  # at the end, when nothing can fail any more
        tell_routing(batch.input_ids[batch.token_mask.bool()], output.routing)
    return log_probs.cpu().double().view(copies, -1), is_top.cpu().view(copies, -1)
