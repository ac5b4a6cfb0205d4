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
from itertools import chain, takewhile
from typing import NamedTuple

import torch
from torch import Tensor

from loraloom.adapters.routed.choice import Choice
from loraloom.base.structure import keeps_running_states
from loraloom.data.tokens import NO_LOSS, Example, TokenPair
from loraloom.devices import free_memory
from loraloom.errors import DataError
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
        groups.setdefault(tuple(pair.context) if shared else choice, []).append(choice)
    return [_make_row(pairs, choices) for choices in groups.values()]


def _make_row(pairs: Sequence[TokenPair], choices: Sequence[int]) -> TokenRow:
    context = pairs[choices[0]].context
    continuations = [pairs[choice].continuation for choice in choices]
    num_shared = _num_shared(continuations)
    trunk = [*context, *continuations[0][:num_shared]]
    num_trunk = len(trunk)
    # the trunk's last states predict what is shared, and then a branch's first token
    trunk_predictors = range(len(context) - 1, num_trunk)
    row = TokenRow(trunk, list(range(num_trunk)), [0] * num_trunk, [], [], [])
    for branch, (choice, continuation) in enumerate(zip(choices, continuations, strict=True), 1):
        branch_ids = continuation[num_shared:-1]
        start = len(row.input_ids)
        row.input_ids.extend(branch_ids)
        row.position_ids.extend(range(num_trunk, num_trunk + len(branch_ids)))
        row.branches.extend([branch] * len(branch_ids))
        row.predictors.extend([*trunk_predictors, *range(start, len(row.input_ids))])
        row.targets.extend(continuation)
        row.choices.extend([choice] * len(continuation))
    return row


def _num_shared(continuations: Sequence[Sequence[int]]) -> int:
    """Tokens with which all of several continuations begin, but for a last token."""
    if len(continuations) == 1:
        return 0
    columns = zip(*(continuation[:-1] for continuation in continuations), strict=False)
    return len(list(takewhile(lambda column: len(set(column)) == 1, columns)))


def collate(
    rows: Sequence[TokenRow], dtype: torch.dtype, device: torch.device, pad_id: int = 0
) -> RowBatch:
    length = max(len(row.input_ids) for row in rows)

    def padded(lists: Iterable[list[int]], fill: int) -> Tensor:
        return torch.tensor([values + [fill] * (length - len(values)) for values in lists])

    branches = padded((row.branches for row in rows), _PADDING)
    token_mask = mask = (branches != _PADDING).long()
    if any(len(set(row.branches)) > 2 for row in rows):
        # a token sees what comes before it in the context and in its own branch
        queries, keys = branches[:, :, None], branches[:, None, :]
        visible = ((keys == 0) | (keys == queries)).tril()  # (B, L, L)
        mask = torch.zeros(visible.shape, dtype=dtype)
        mask = mask.masked_fill_(~visible, torch.finfo(dtype).min).unsqueeze(1)
    predictors: list[int] = []
    targets: list[int] = []
    for index, row in enumerate(rows):
        predictors += [index * length + predictor for predictor in row.predictors]
        targets += row.targets
    return RowBatch(
        input_ids=padded((row.input_ids for row in rows), pad_id).to(device),
        position_ids=padded((row.position_ids for row in rows), 0).to(device),
        attention_mask=mask,
        token_mask=token_mask,
        predictors=torch.tensor(predictors, dtype=torch.long, device=device),
        targets=torch.tensor(targets, dtype=torch.long, device=device),
    )


# A row's adapter, and what it is to score.
Request = tuple[RowAdapter, TokenRow]

# The rows of continuations that belong together, such as the choices of a question.
Group = Sequence[TokenRow]


class TokenScores(NamedTuple):
    """What a model makes of a row's scored tokens, on the CPU."""

    log_probs: Tensor
    is_top: Tensor
    top_log_probs: Tensor
    top_ids: Tensor


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


def in_halves(
    compute: Callable[[Sequence[int]], list[TokenScores]],
    indices: Sequence[int],
    requests: Sequence[Request],
) -> list[TokenScores]:
    """Score requests together, or in halves, and halves of these, where memory runs out."""
    try:
        return compute(indices)
    except torch.OutOfMemoryError:
        if len(indices) == 1:
            length = len(requests[indices[0]][1].input_ids)
            raise too_large(f"a row of {length} tokens to be scored") from None
    free_memory()
    middle = (len(indices) + 1) // 2
    halves = (indices[:middle], indices[middle:])
    return [result for half in halves for result in in_halves(compute, half, requests)]


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
            batch, num_rows = [], 0
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
    num_top: int = 0,
) -> list[TokenScores]:
    """Score rows, each with its adapter, without dropout and gradients."""
    chosen = _chosen(host, requests, on_routing)
    kinds = []
    for before, after in zip(requests, chosen, strict=True):
        is_long = max(after[1].position_ids, default=0) >= host.max_positions
        kinds.append(RowKind(is_as_asked=after is before, is_long=is_long))
    batches = plan_batches(chosen, kinds, max_tokens or tokens_per_batch(host))

    def score(indices: Sequence[int]) -> list[tuple[Tensor, ...]]:
        observer = on_routing if kinds[indices[0]].is_as_asked else None
        forward = partial(_forward, host, chosen, on_routing=observer, num_top=num_top)
        with host.prepared():  # of a batch alone: each of many routed rows may have its own sum
            # ranks send one another tensors and no classes, which unpickling would have to trust
            return [tuple(scores) for scores in in_halves(forward, indices, chosen)]

    nothing = torch.zeros(0, 2 + 2 * num_top, dtype=torch.float64)
    scores = [_scores_of(nothing, num_top)] * len(requests)
    with torch.no_grad():
        results = chain.from_iterable(host.ranks.spread(batches, score))
        for index, result in zip(chain.from_iterable(batches), results, strict=True):
            scores[index] = TokenScores(*result)
    return scores


def plan_batches(
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
        rows = [requests[index][1:] for index in indices]
        for members in token_batches(rows, max_tokens):
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
    choices = host.choose([_prompt_of(row) for _, row in requests], adapters)
    chosen = [*requests]
    routed = defaultdict[str, list[int]](list)  # places by the router's name
    for index, choice in enumerate(choices):
        if choice.probabilities is not None:
            chosen[index] = choice.adapter, requests[index][1]
            routed[str(name_and_scale(adapters[index])[0])].append(index)
    if on_routing is not None:
        for name, indices in routed.items():
            rows = [requests[index][1] for index in indices]
            record = _record_of(host, name, [choices[index] for index in indices], rows)
            on_routing(RoutedRows(name, indices, rows, [record]))
    return chosen


def _record_of(
    host: Host, name: str, choices: Sequence[Choice], rows: Sequence[TokenRow]
) -> LayerRouting:
    num_tokens = torch.tensor([len(row.input_ids) for row in rows])
    probabilities = torch.tensor([[*(choice.probabilities or {}).values()] for choice in choices])
    p = probabilities.repeat_interleave(num_tokens, dim=0)  # (T, E)
    top_k = host.adapter(name).config.experts_per_token or 1
    weights, selected = p.topk(top_k)  # (T, K)
    weights = weights / weights.sum(1, keepdim=True)
    return LayerRouting(0, p.clamp_min(1e-30).log(), selected, weights, "prompt")


def _prompt_of(row: TokenRow) -> Sequence[int]:
    if any(row.predictors[:1]):
        return row.input_ids[: row.predictors[0] + 1]
    return row.input_ids  # all of a text, which has no prompt


def _forward(
    host: Host,
    requests: Sequence[Request],
    indices: Sequence[int],
    on_routing: OnRouting | None,
    num_top: int,
) -> list[TokenScores]:
    adapters, rows = zip(*(requests[index] for index in indices), strict=True)
    batch = collate(rows, host.dtype, host.device)
    output = host.hidden(
        batch.input_ids,
        batch.attention_mask,
        list(adapters),
        token_mask=batch.token_mask,
        training=False,
        position_ids=batch.position_ids,
    )
    states = batch.predicting_states(output.last_hidden_state)
    heads = owners(rows, adapters)
    log_probs, is_top, *tops = host.token_scores(states, batch.targets, heads, num_top)
    columns = [widened(column) for column in (log_probs[:, None], is_top[:, None], *tops)]
    values = torch.cat(columns, dim=1).cpu()  # (N, 2 + 2K), at once
    num_scored = [len(row.targets) for row in rows]
    scores = [_scores_of(of_row, num_top) for of_row in values.split(num_scored)]
    if on_routing is not None:  # at the end, when nothing can fail any more
        for name, routing in output.routing.items():
            routed = [index for index in indices if requests[index][0] == name]
            routed_rows = [requests[index][1] for index in routed]
            on_routing(RoutedRows(name, routed, routed_rows, routing))
    return scores


def _scores_of(values: Tensor, num_top: int) -> TokenScores:
    log_probs, is_top, top_log_probs, top_ids = values.split([1, 1, num_top, num_top], dim=1)
    return TokenScores(
        log_probs.squeeze(1), is_top.squeeze(1).bool(), top_log_probs, top_ids.long()
    )


def label_log_probs(host: Host, examples: Sequence[tuple[str | None, Example]]) -> list[Tensor]:
    requests = [(name, example_row(example)) for name, example in examples]
    return [scores.log_probs for scores in score_rows(host, requests)]


def group_rows(host: Host, groups: Sequence[Sequence[TokenPair]]) -> list[list[TokenRow]]:
    """Make each group's rows; continuations share one where attention takes a mask of our own."""
    # FlashAttention takes none, it lacks sliding windows, and running states and ALiBi ignore it.
    rows = [make_rows(pairs, shared=True) for pairs in groups]
    longest = max((len(row.input_ids) for group in rows for row in group), default=0)
    window = host.config.to_dict().get("sliding_window")
    takes_mask = host.config._attn_implementation in ("sdpa", "eager")
    takes_mask = takes_mask and not keeps_running_states(host.config)
    takes_mask = takes_mask and not getattr(host.config, "alibi", False)  # of columns' distances
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
        on_routing(routed._replace(places=[rows[request][2] for request in routed.places]))

    requests = [(name, row) for name, row, _ in rows]
    scores = iter(score_rows(host, requests, max_tokens, on_routing and tell))
    pair_scores = []
    for _, group in selection:
        row_scores = [next(scores) for _ in groups[group]]
        pair_scores.append(_score_pairs(groups[group], row_scores))
    return pair_scores


def _score_pairs(rows: Group, scores: Sequence[TokenScores]) -> list[PairScore]:
    choices = torch.tensor([choice for row in rows for choice in row.choices])
    log_probs = torch.cat([score.log_probs for score in scores])
    misses = torch.cat([~score.is_top for score in scores]).to(log_probs.dtype)
    zeros = log_probs.new_zeros(int(choices.max()) + 1)
    log_likelihoods = zeros.index_add(0, choices, log_probs).tolist()
    num_misses = zeros.index_add(0, choices, misses).tolist()
    return [
        PairScore(log_likelihood, is_greedy=count == 0)
        for log_likelihood, count in zip(log_likelihoods, num_misses, strict=True)
    ]
