"""Rows of tokens, some of which are scored, and batches of rows.

Axes: B rows, L tokens, N scored tokens, D hidden.

A question's choices share a row: the context once, and after it each choice's continuation without
its last token, which is only predicted. A continuation's positions count from the end of the
context, and it sees the context and itself alone, so that it gets its own log-likelihood:

    input_ids       Q  :  a  blue  the  red      of  Q: a blue sky  and  Q: the red sea
    position_ids    0  1  2    3    2    3
    branches        0  0  1    1    2    2

Tokens that all continuations begin with are part of the context; an example of training data has
no branches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import Tensor

from loraloom.data.tokens import NO_LOSS, Example, TokenPair
from loraloom.errors import DataError
from loraloom.models.layout import RowAdapter

_PADDING = -1  # branch of the padding


@dataclass(frozen=True)
class TokenRow:
    """Tokens that are read together, and those that are scored."""

    # `branches` is 0 in the context and counts continuations from 1. Then an entry for each scored
    # token: the place in the row whose state predicts it, its id, and its choice.

    input_ids: list[int]
    position_ids: list[int]
    branches: list[int]
    predictors: list[int]
    targets: list[int]
    choices: list[int]


@dataclass(frozen=True)
class RowBatch:
    """Rows padded on the right; masks stay on the CPU, where the host reads them."""

    # `attention_mask` is [B, L] where no row branches, else what is added to scores, [B, 1, L, L].
    # `token_mask` is 1 at tokens, 0 at padding. `predictors` counts in the flattened batch.

    input_ids: Tensor  # (B, L)
    position_ids: Tensor  # (B, L)
    attention_mask: Tensor
    token_mask: Tensor  # (B, L)
    predictors: Tensor  # (N,)
    targets: Tensor  # (N,)

    def predicting_states(self, hidden_states: Tensor) -> Tensor:
        return hidden_states.flatten(0, 1).index_select(0, self.predictors)  # (N, D)


def owners(rows: Sequence[TokenRow], adapters: Sequence[RowAdapter]) -> list[RowAdapter]:
    return [adapter for row, adapter in zip(rows, adapters, strict=True) for _ in row.targets]


def fit_pair(pair: TokenPair, max_length: int, name: str = "a continuation") -> TokenPair:
    """Cut a context from the left so that the model reads at most `max_length` tokens."""
    # The last token is predicted, not read, as in lm-eval 0.4.13, `_loglikelihood_tokens`.
    num_tokens = len(pair.continuation)
    if not 1 <= num_tokens <= max_length:
        raise DataError(f"{name} must have 1 to {max_length} tokens, got {num_tokens}")
    return TokenPair(pair.context[-(max_length + 1 - num_tokens) :], pair.continuation)


def example_row(example: Example) -> TokenRow:
    length = len(example.input_ids)
    labelled = [place for place in range(1, length) if example.labels[place] != NO_LOSS]
    return TokenRow(
        input_ids=list(example.input_ids),
        position_ids=list(range(length)),
        branches=[0] * length,
        predictors=[place - 1 for place in labelled],
        targets=[example.labels[place] for place in labelled],
        choices=[0] * len(labelled),
    )


def make_rows(pairs: Sequence[TokenPair], *, shared: bool) -> list[TokenRow]:
    groups: dict[object, list[int]] = {}
    for choice, pair in enumerate(pairs):
        groups.setdefault(tuple(pair.context) if shared else choice, []).append(choice)
    return [_make_row(pairs, choices) for choices in groups.values()]


def _make_row(pairs: Sequence[TokenPair], choices: Sequence[int]) -> TokenRow:
    context, num_shared = pairs[choices[0]].context, 0
    if len(choices) > 1:  # what all begin with, but for a last token
        columns = zip(*(pairs[choice].continuation[:-1] for choice in choices), strict=False)
        num_shared = len(list(takewhile(lambda column: len(set(column)) == 1, columns)))
    trunk = [*context, *pairs[choices[0]].continuation[:num_shared]]
    first, end = len(context) - 1, len(trunk)
    row = TokenRow(trunk, list(range(end)), [0] * end, [], [], [])
    for branch, choice in enumerate(choices, start=1):
        continuation = pairs[choice].continuation
        branch_ids = continuation[num_shared:-1]
        start = len(row.input_ids)
        row.input_ids.extend(branch_ids)
        row.position_ids.extend(range(end, end + len(branch_ids)))
        row.branches.extend([branch] * len(branch_ids))
        row.predictors.extend([*range(first, end), *range(start, start + len(branch_ids))])
        row.targets.extend(continuation)
        row.choices.extend([choice] * len(continuation))
    return row


def collate(
    rows: Sequence[TokenRow], dtype: torch.dtype, device: torch.device, pad_id: int = 0
) -> RowBatch:
    length = max(len(row.input_ids) for row in rows)

    def padded(lists: Iterable[list[int]], fill: int) -> Tensor:
        return torch.tensor([one + [fill] * (length - len(one)) for one in lists])

    branches = padded((row.branches for row in rows), _PADDING)
    token_mask = mask = (branches != _PADDING).long()
    if any(len(set(row.branches)) > 2 for row in rows):
        # a token sees what comes before it in the context and in its own branch
        queries, keys = branches[:, :, None], branches[:, None, :]
        visible = ((keys == 0) | (keys == queries)).tril()  # (B, L, L)
        mask = torch.zeros(visible.shape, dtype=dtype)
        mask = mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
    predictors = [
        place * length + predictor for place, row in enumerate(rows) for predictor in row.predictors
    ]
    targets = [target for row in rows for target in row.targets]
    return RowBatch(
        input_ids=padded((row.input_ids for row in rows), pad_id).to(device),
        position_ids=padded((row.position_ids for row in rows), 0).to(device),
        attention_mask=mask,
        token_mask=token_mask,
        predictors=torch.tensor(predictors, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
    )
