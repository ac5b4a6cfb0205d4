"""Log probabilities of given tokens, by several adapters in one forward.

Axes: B rows, L tokens, N scored tokens, D hidden. A request is an adapter and a row; they are
sorted by length, batched by tokens, and done in halves where memory runs out.

A question's choices share a row: the context once, and after it each choice's continuation without
its last token, which is only predicted. A continuation's positions count from the end of the
context, and it sees the context and itself alone, so that it gets its own log-likelihood:

    input_ids       Q  :  a  blue  the  red      of  Q: a blue sky  and  Q: the red sea
    position_ids    0  1  2    3    2    3
    branches        0  0  1    1    2    2

Tokens that all continuations begin with are part of the context; an example of training data has
no branches.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from loraloom.base.structure import keeps_running_states
from loraloom.data.tokens import NO_LOSS, Example, TokenPair, count_shared
from loraloom.devices import free_memory
from loraloom.errors import DataError
from loraloom.host.choice import Choice
from loraloom.host.host import Host
from loraloom.host.layout import RowAdapter, name_and_scale
from loraloom.routing.record import LayerRouting
from loraloom.routing.tally import widened

_PADDING = -1  # branch of the padding


@dataclass(frozen=True)
class TokenRow:
    """Tokens that are read together, and those that are scored."""

    input_ids: list[int]
    position_ids: list[int]
    branches: list[int]  # 0 in the context; continuations count from 1
    predictors: list[int]  # of each scored token, the place in the row whose state predicts it
    targets: list[int]  # its id
    choices: list[int]  # its choice


@dataclass(frozen=True)
class RowBatch:
    """Rows padded on the right; masks stay on the CPU, where the host reads them."""

    input_ids: Tensor  # (B, L)
    position_ids: Tensor  # (B, L)
    attention_mask: Tensor  # (B, L), or if a row branches, what is added to scores, (B, 1, L, L)
    token_mask: Tensor  # 1 at tokens, 0 at padding, (B, L)
    predictors: Tensor  # places in the flattened batch, (N,)
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
    labels = example.labels
    scored = [index for index in range(1, length) if labels[index] != NO_LOSS]
    return TokenRow(
        input_ids=list(example.input_ids),
        position_ids=list(range(length)),
        branches=[0] * length,
        predictors=[index - 1 for index in scored],
        targets=[labels[index] for index in scored],
        choices=[0] * len(scored),
    )


def make_rows(pairs: Sequence[TokenPair], *, shared: bool) -> list[TokenRow]:
    groups: dict[object, list[int]] = {}
    for choice, pair in enumerate(pairs):
        key = choice
        if shared:
            key = tuple(pair.context)
        groups.setdefault(key, []).append(choice)
    return [_make_row(pairs, choices) for choices in groups.values()]


def _make_row(pairs: Sequence[TokenPair], choices: Sequence[int]) -> TokenRow:
    context = pairs[choices[0]].context
    first = pairs[choices[0]].continuation
    num_shared = 0
    if len(choices) > 1:  # tokens with which all begin, but for a last one
        num_shared = min(count_shared(first, pairs[choice].continuation[:-1]) for choice in choices)
    trunk = [*context, *first[:num_shared]]
    length = len(trunk)
    # the trunk's last states predict what is shared, and then a branch's first token
    trunk_predictors = range(len(context) - 1, length)
    row = TokenRow(trunk, list(range(length)), [0] * length, [], [], [])
    for branch, choice in enumerate(choices, start=1):
        continuation = pairs[choice].continuation
        branch_ids = continuation[num_shared:-1]
        start = len(row.input_ids)
        row.input_ids.extend(branch_ids)
        row.position_ids.extend(range(length, length + len(branch_ids)))
        row.branches.extend([branch] * len(branch_ids))
        row.predictors.extend(trunk_predictors)
        row.predictors.extend(range(start, len(row.input_ids)))
        row.targets.extend(continuation)
        row.choices.extend([choice] * len(continuation))
    return row


def collate(
    rows: Sequence[TokenRow], dtype: torch.dtype, device: torch.device, pad_id: int = 0
) -> RowBatch:
    def padded(lists: Iterable[list[int]], fill: int) -> Tensor:
        tensors = [torch.tensor(values) for values in lists]
        return pad_sequence(tensors, batch_first=True, padding_value=fill)

    branches = padded((row.branches for row in rows), _PADDING)
    token_mask = (branches != _PADDING).long()
    mask = token_mask
    if any(len(set(row.branches)) > 2 for row in rows):
        # a token sees what comes before it in the context and in its own branch
        queries = branches[:, :, None]
        keys = branches[:, None, :]
        visible = ((keys == 0) | (keys == queries)).tril()  # (B, L, L)
        mask = torch.zeros(visible.shape, dtype=dtype)
        mask = mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
    predictors: list[int] = []
    targets: list[int] = []
    for index, row in enumerate(rows):
        start = index * branches.shape[1]
        predictors += [start + predictor for predictor in row.predictors]
        targets += row.targets
    # Two and two at once, as each copy waits for the device.
    input_ids = padded((row.input_ids for row in rows), pad_id)
    position_ids = padded((row.position_ids for row in rows), 0)
    input_ids, position_ids = torch.stack([input_ids, position_ids]).to(device)
    scored = torch.tensor([predictors, targets], dtype=torch.long, device=device)
    return RowBatch(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        token_mask=token_mask,
        predictors=scored[0],
        targets=scored[1],
    )


# A row's adapter, and what it is to score.
Request = tuple[RowAdapter, TokenRow]

# The rows of continuations that belong together, such as the choices of a question.
Group = Sequence[TokenRow]


class PairScore(NamedTuple):
    """What a model makes of a continuation."""

    log_likelihood: float
    is_greedy: bool


class RoutedRows(NamedTuple):
    """Rows of a mixture that were scored in a forward."""

    adapter: str
    places: Sequence[int]
    rows: Sequence[TokenRow]
    routing: Sequence[LayerRouting]


OnRouting = Callable[[RoutedRows], None]


def too_large(item: str) -> DataError:
    return DataError(
        f"{item} does not fit into memory, even alone; free memory, or load the base in bfloat16"
    )


def _in_halves(
    compute: Callable[[Sequence[int]], list[Tensor]],
    indices: Sequence[int],
    requests: Sequence[Request],
) -> list[Tensor]:
    """Score requests together, or in halves, and halves of these, where memory runs out."""
    try:
        return compute(indices)
    except torch.OutOfMemoryError:
        if len(indices) == 1:
            length = len(requests[indices[0]][1].input_ids)
            raise too_large(f"a row of {length} tokens to be scored") from None
    free_memory()
    middle = (len(indices) + 1) // 2
    first = _in_halves(compute, indices[:middle], requests)
    return first + _in_halves(compute, indices[middle:], requests)


def tokens_per_batch(host: Host) -> int:
    return 1024 if host.device.type == "cpu" else 16384


def token_batches(groups: Sequence[Group], max_tokens: int) -> Iterator[list[int]]:
    """Cut groups into batches of like lengths, the longest first; each is a list of places."""
    lengths = [max(len(row.input_ids) for row in rows) for rows in groups]
    batch: list[int] = []
    num_rows = 0
    for index in sorted(range(len(groups)), key=lambda index: -lengths[index]):
        added = len(groups[index])
        if batch and (num_rows + added) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
            num_rows = 0
        batch.append(index)
        num_rows += added
    if batch:
        yield batch


class RowKind(NamedTuple):
    """What the rows of a forward have in common, besides their length."""

    is_as_asked: bool  # else a router chose its adapter, and it is counted as the router's
    is_long: bool  # its positions turn the keys of others


def score_rows(
    host: Host,
    requests: Sequence[Request],
    max_tokens: int | None = None,
    on_routing: OnRouting | None = None,
) -> list[Tensor]:
    """Score rows, each with its adapter, without dropout and gradients.

    Returns:
        For each row, log p of its scored tokens, and whether they are the likeliest, [N, 2].
    """
    chosen = _chosen(host, requests, on_routing)
    kinds: list[RowKind] = []
    for before, after in zip(requests, chosen, strict=True):
        is_long = max(after[1].position_ids, default=0) >= host.max_positions
        kinds.append(RowKind(is_as_asked=after is before, is_long=is_long))
    batches = _plan_batches(chosen, kinds, max_tokens or tokens_per_batch(host))

    def score(indices: Sequence[int]) -> list[Tensor]:
        observer = None
        if kinds[indices[0]].is_as_asked:
            observer = on_routing
        with host.prepared():  # of a batch alone: each of many routed rows may have its own sum
            return _in_halves(partial(_forward, host, chosen, observer), indices, chosen)

    scores = [torch.zeros(0, 2, dtype=torch.float64)] * len(requests)
    with torch.no_grad():
        results = chain.from_iterable(host.ranks.spread(batches, score))
        for index, scores_of_row in zip(chain.from_iterable(batches), results, strict=True):
            scores[index] = scores_of_row
    return scores


def _plan_batches(
    requests: Sequence[Request], kinds: Sequence[RowKind], max_tokens: int
) -> list[list[int]]:
    """Plan forwards of rows of one kind, in which those of an adapter lie together."""
    indices_by_kind = defaultdict[RowKind, list[int]](list)
    for index, (_, row) in enumerate(requests):
        if row.targets:
            indices_by_kind[kinds[index]].append(index)
    numbers = {adapter: number for number, (adapter, _) in enumerate(requests)}
    batches = []
    for _, indices in sorted(indices_by_kind.items(), reverse=True):
        groups = [[requests[index][1]] for index in indices]
        for members in token_batches(groups, max_tokens):
            batch = [indices[member] for member in members]
            batch.sort(key=lambda index: numbers[requests[index][0]])  # halves have few adapters
            batches.append(batch)
    return batches


def _chosen(
    host: Host, requests: Sequence[Request], on_routing: OnRouting | None
) -> Sequence[Request]:
    """Put what routers choose by prompts, the tokens before those that are scored, in their place.

    Such a choice is told as that of a router in front of all layers, for each token of a row.
    """
    adapters = [adapter if row.targets else None for adapter, row in requests]
    rows = [row for _, row in requests]
    choices = host.choose([_prompt_of(row) for row in rows], adapters)
    chosen = [*requests]
    indices_by_router = defaultdict[str, list[int]](list)
    for index, choice in enumerate(choices):
        if choice.probabilities is not None:
            chosen[index] = choice.adapter, rows[index]
            name, _ = name_and_scale(adapters[index])
            indices_by_router[str(name)].append(index)
    if on_routing is None:
        return chosen
    for name, indices in indices_by_router.items():
        routed_rows = [rows[index] for index in indices]
        record = _record_of(host, name, [choices[index] for index in indices], routed_rows)
        on_routing(RoutedRows(name, indices, routed_rows, [record]))
    return chosen


def _record_of(
    host: Host, name: str, choices: Sequence[Choice], rows: Sequence[TokenRow]
) -> LayerRouting:
    probabilities = []
    for choice, row in zip(choices, rows, strict=True):
        assert choice.probabilities is not None
        probabilities += [list(choice.probabilities.values())] * len(row.input_ids)
    p = torch.tensor(probabilities)  # (T, E)
    top_k = host.adapter(name).config.experts_per_token or 1
    weights, selected = p.topk(top_k)  # (T, K)
    weights = weights / weights.sum(1, keepdim=True)
    return LayerRouting(0, p.clamp_min(1e-30).log(), selected, weights, "prompt")


def _prompt_of(row: TokenRow) -> Sequence[int]:
    first = min(row.predictors, default=0)
    if first == 0:  # a text, which has no prompt
        return row.input_ids
    return row.input_ids[: first + 1]


def _forward(
    host: Host,
    requests: Sequence[Request],
    on_routing: OnRouting | None,
    indices: Sequence[int],
) -> list[Tensor]:
    adapters = [requests[index][0] for index in indices]
    rows = [requests[index][1] for index in indices]
    batch = collate(rows, host.dtype, host.device)
    output = host.hidden(
        batch.input_ids,
        batch.attention_mask,
        adapters,
        token_mask=batch.token_mask,
        training=False,
        position_ids=batch.position_ids,
    )
    states = batch.predicting_states(output.last_hidden_state)
    log_probs, is_top, *_ = host.token_scores(states, batch.targets, owners(rows, adapters))
    scores = torch.stack([widened(log_probs), widened(is_top)], dim=1).cpu()  # (N, 2), at once
    scores_by_row = scores.split([len(row.targets) for row in rows])
    if on_routing is not None:  # at the end, when nothing can fail any more
        for name, routing in output.routing.items():
            routed = [index for index in indices if requests[index][0] == name]
            routed_rows = [requests[index][1] for index in routed]
            on_routing(RoutedRows(name, routed, routed_rows, routing))
    return list(scores_by_row)


def label_log_probs(host: Host, examples: Sequence[tuple[str | None, Example]]) -> list[Tensor]:
    requests = [(name, example_row(example)) for name, example in examples]
    return [scores[:, 0] for scores in score_rows(host, requests)]


def group_rows(host: Host, groups: Sequence[Sequence[TokenPair]]) -> list[list[TokenRow]]:
    """Make each group's rows; continuations share one where attention takes a mask of our own."""
    # FlashAttention takes none, it lacks sliding windows, and running states and ALiBi ignore it.
    rows = [make_rows(pairs, shared=True) for pairs in groups]
    longest = max((len(row.input_ids) for group in rows for row in group), default=0)
    window = host.config.to_dict().get("sliding_window")
    takes_mask = (
        host.config._attn_implementation in ("sdpa", "eager")
        and not keeps_running_states(host.config)
        and not getattr(host.config, "alibi", False)  # of columns' distances
    )
    if takes_mask and (window is None or longest <= window):
        return rows
    return [make_rows(pairs, shared=False) for pairs in groups]


def score_groups(
    host: Host,
    groups: Sequence[Group],
    selection: Sequence[tuple[str | None, int]],
    max_tokens: int | None = None,
    on_routing: OnRouting | None = None,
) -> list[list[PairScore]]:
    """Score every continuation of groups; `selection` are adapters and places of groups."""
    rows = [(name, row, group) for name, group in selection for row in groups[group]]

    def tell(routed: RoutedRows) -> None:
        assert on_routing is not None
        groups_of_rows = [rows[request][2] for request in routed.places]
        on_routing(routed._replace(places=groups_of_rows))

    requests = [(name, row) for name, row, _ in rows]
    observer = None if on_routing is None else tell
    scores = iter(score_rows(host, requests, max_tokens, observer))
    pair_scores = []
    for _, group in selection:
        row_scores = [next(scores) for _ in groups[group]]
        pair_scores.append(_score_pairs(groups[group], row_scores))
    return pair_scores


def _score_pairs(rows: Group, scores: Sequence[Tensor]) -> list[PairScore]:
    choices = torch.tensor([choice for row in rows for choice in row.choices])
    log_probs, is_top = torch.cat(list(scores)).unbind(1)
    zeros = log_probs.new_zeros(int(choices.max()) + 1)
    log_likelihoods = zeros.index_add(0, choices, log_probs).tolist()
    num_misses = zeros.index_add(0, choices, 1 - is_top).tolist()
    return [
        PairScore(log_likelihood, is_greedy=count == 0)
        for log_likelihood, count in zip(log_likelihoods, num_misses, strict=True)
    ]
