"""What answers a prompt: its adapter, or the experts that a router chooses for the whole prompt.

Axes: B prompts, L tokens of the longest, T tokens of all, D hidden, E experts, K top_k.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.contract import Adapter
from loraloom.adapters.routed.method import prompt_router_of
from loraloom.adapters.routed.prompt_router import PromptRouter
from loraloom.adapters.weighted_sum import write_sum
from loraloom.base.sharding import recovering
from loraloom.errors import DataError, not_finite
from loraloom.host.layout import RowAdapter, name_and_scale
from loraloom.ops.token_loss import is_broken

# Tokens of a prompt that are read: its last ones.
MAX_PROMPT = 512
# Tokens of a forward.
MAX_TOKENS = 8192


class Choice(NamedTuple):
    """What answers a prompt, and where a router has chosen, how sure it was and why."""

    adapter: str | tuple[str, float] | None  # as a row's
    probabilities: Mapping[str, float] | None = None  # of all experts
    telling_token: int = 0  # which speaks for the expert most


def describe_choice(choice: Choice, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Describe what a router has chosen, and why; nothing where none has."""
    if choice.probabilities is None:
        return {}
    terms = str(name_and_scale(choice.adapter)[0]).split("+")
    names = "+".join(term.rpartition("/")[2] for term in terms)
    chosen = {"adapter": names, "probabilities": choice.probabilities}
    if len(choice.probabilities) > 1:
        chosen["because"] = tokenizer.decode([choice.telling_token])
    return {"chosen": chosen}


class _Enough(Exception):  # noqa: N818, it is none
    """The states that were asked for are there."""


def is_routed(host: Any, adapter: RowAdapter) -> bool:
    """Whether a router chooses by the prompt what a row with this adapter gets."""
    name, _ = name_and_scale(adapter)
    return name is not None and prompt_router_of(host.adapter(name)) is not None


@torch.no_grad()
def choose(
    host: Any, prompts: Sequence[Sequence[int]], adapters: Sequence[RowAdapter]
) -> list[Choice]:
    choices = list[Choice]()
    rows_by_name: dict[str, list[int]] = {}
    for row, (adapter, _) in enumerate(zip(adapters, prompts, strict=True)):
        name, scale = name_and_scale(adapter)
        if name is None or scale == 1:
            choices.append(Choice(name))
        else:
            choices.append(Choice((name, scale)))
        if name is not None and is_routed(host, name):
            rows_by_name.setdefault(name, []).append(row)
    for name, rows in rows_by_name.items():
        chosen = _choose_experts(host, host.adapter(name), [prompts[row] for row in rows])
        for row, choice in zip(rows, chosen, strict=True):
            _, scale = name_and_scale(adapters[row])
            if scale != 1:
                choice = choice._replace(adapter=(str(choice.adapter), scale))
            choices[row] = choice
    return choices


def _choose_experts(host: Any, adapter: Adapter, prompts: Sequence[Sequence[int]]) -> list[Choice]:
    """Choose what answers each prompt, in the order of the prompts."""
    router = prompt_router_of(adapter)
    assert router is not None
    choices: dict[int, Choice] = {}
    for indices, states, owners in prompt_states(host, prompts, router.num_layers_read):
        batch = [prompts[index][-MAX_PROMPT:] for index in indices]
        chosen = _choose_in_batch(adapter, router, batch, states, owners)
        choices.update(zip(indices, chosen, strict=True))
    return [choices[index] for index in range(len(prompts))]


def _choose_in_batch(
    adapter: Adapter,
    router: PromptRouter,
    prompts: Sequence[Sequence[int]],
    states: Tensor,
    owners: Tensor,
) -> list[Choice]:
    logits = router(states, owners)  # (B, E)
    if is_broken(logits).any():
        raise not_finite("logits of its router", "infinite ones or NaN", [adapter.name])
    top, top_experts = logits.topk(adapter.config.experts_per_token)  # (B, K)
    # A token speaks for an expert by how much its score exceeds that of all on average.
    scores = router.scores(states)  # (T, E)
    best = top_experts[owners, :1]  # of a token's prompt, (T, 1)
    excess = scores.gather(1, best).squeeze(1) - scores.mean(1)  # (T,)
    by_prompt = excess.split([len(prompt) for prompt in prompts])
    weights = top.softmax(-1).tolist()
    probabilities = logits.softmax(-1).tolist()
    names = list(adapter.members)
    choices = list[Choice]()
    for row, experts in enumerate(top_experts.tolist()):
        # In hundredths, so that rows share sums.
        shares = round_shares(weights[row])
        paths = [f"{adapter.name}/{names[expert]}" for expert in experts]
        chosen = [(path, share) for path, share in zip(paths, shares, strict=True) if share]
        telling = int(by_prompt[row].argmax())
        choice = Choice(
            adapter=chosen[0][0] if len(chosen) == 1 else write_sum(chosen),
            probabilities=dict(zip(names, probabilities[row], strict=True)),
            telling_token=prompts[row][telling],
        )
        choices.append(choice)
    return choices


def round_shares(shares: Sequence[float]) -> list[float]:
    """Round shares to hundredths that sum to 1, by largest remainders; their order stays."""
    total = sum(shares)
    exact = [100 * share / total for share in shares]
    hundredths = [math.floor(value) for value in exact]

    def priority(index: int) -> tuple[float, float]:
        return hundredths[index] - exact[index], -shares[index]

    num_missing = 100 - sum(hundredths)
    for index in sorted(range(len(exact)), key=priority)[:num_missing]:
        hundredths[index] += 1
    return [number / 100 for number in hundredths]


@torch.no_grad()
def prompt_states(
    host: Any, prompts: Sequence[Sequence[int]], num_layers: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Compute the base model's hidden states of prompts after N layers; 0: the embeddings.

    Yields:
        For each batch, the indices of its prompts, the states of their tokens, [T, D], and the
        number in the batch of each token's prompt, [T].
    """
    layer = host.model.get_input_embeddings()
    if num_layers:
        layers = host.model.get_submodule(host.base.layers_path)
        layer = layers[num_layers - 1]
    for indices, ids, mask in _batches_of(prompts, host.config.vocab_size):
        # The hook needs the lock, and a sharded model must recover from the forward's early end.
        with host.forwards.without_adapters(), _output_of(layer) as outputs, recovering(host.model):
            host.forwards.run_decoder(
                input_ids=ids.to(host.device),
                attention_mask=mask.to(host.device),
                use_cache=False,
            )
        rows, columns = mask.nonzero(as_tuple=True)
        rows = rows.to(host.device)
        columns = columns.to(host.device)
        (states,) = outputs
        yield indices, states[rows, columns], rows


def _batches_of(
    prompts: Sequence[Sequence[int]], vocab_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Cut prompts into batches of like lengths: indices, ids padded on the right, masks, [B, L]."""
    for prompt in prompts:
        if not prompt or min(prompt) < 0 or max(prompt) >= vocab_size:
            raise DataError(
                f"a prompt must have tokens from 0 to {vocab_size - 1}, got none or others"
            )
    by_length = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    start = 0
    while start < len(by_length):
        longest = prompts[by_length[start]]
        length = min(len(longest), MAX_PROMPT)
        num_rows = max(1, MAX_TOKENS // length)
        indices = by_length[start : start + num_rows]
        start += num_rows
        ids = [torch.tensor([*prompts[index]][-MAX_PROMPT:]) for index in indices]
        lengths = torch.tensor([len(ids_of_prompt) for ids_of_prompt in ids])
        mask = (lengths[:, None] > torch.arange(length)).long()
        yield indices, pad_sequence(ids, batch_first=True), mask


@contextmanager
def _output_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Take what a layer computes, and end the forward with it."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, tuple):
            output = output[0]
        outputs.append(output)
        raise _Enough

    hook = layer.register_forward_hook(keep)
    try:
        with suppress(_Enough):
            yield outputs
    finally:
        hook.remove()
