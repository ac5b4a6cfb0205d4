"""Which of its adapters a routed one chooses for a whole prompt, by the base model's states.

Axes: B prompts, E experts.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loraloom.adapters.contract import Adapter
from loraloom.adapters.weighted_sum import write_sum
from loraloom.errors import DataError, not_finite
from loraloom.host.layout import RowAdapter, name_and_scale
from loraloom.ops.token_loss import is_broken

# Tokens of a forward, and of a prompt those that are read: its last ones.
MAX_TOKENS, MAX_PROMPT = 8192, 512


class Choice(NamedTuple):
    """What answers a prompt, and where a router has chosen, how sure it was and why."""

    adapter: RowAdapter
    probabilities: Mapping[str, float] | None = None  # of all experts
    telling_token: int = 0  # which speaks for the expert most


def told(choice: Choice, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Tell people what a router has chosen, and why; nothing where none has."""
    if choice.probabilities is None:
        return {}
    parts = str(name_and_scale(choice.adapter)[0]).split("+")
    names = "+".join(part.rpartition("/")[2] for part in parts)
    chosen = {"adapter": names, "probabilities": choice.probabilities}
    if len(choice.probabilities) > 1:
        chosen["because"] = tokenizer.decode([choice.telling_token])
    return {"chosen": chosen}


class _Enough(Exception):  # noqa: N818, it is none
    """The states that were asked for are there."""


def is_routed(host: Any, adapter: RowAdapter) -> bool:
    """Whether a router chooses by the prompt what a row with this adapter gets."""
    name, _ = name_and_scale(adapter)
    return name is not None and host.adapter(name).chooser is not None


@dataclass(frozen=True)
class RouterScores:
    """How a router by prompt judges one prompt."""

    experts: Sequence[int]  # the chosen ones, the most probable first
    weights: Sequence[float]  # of the chosen experts
    probabilities: Sequence[float]  # of all experts
    telling_token: int  # place of the token that speaks most for the first expert


def score_prompts(adapter: Adapter, states: Tensor, owners: Tensor) -> list[RouterScores]:
    """Judge prompts by their tokens' states, [T, D], and the numbers of their prompts, [T]."""
    router = adapter.chooser
    assert router is not None
    logits = router(states, owners)  # (B, E)
    if is_broken(logits).any():
        raise not_finite("logits of its router", "infinite ones or NaN", [adapter.name])
    top, chosen = logits.topk(adapter.config.experts_per_token)  # (B, K)
    # A token speaks for an expert by how much its score exceeds that of all on average.
    scores = router.scores(states)  # (T, E)
    excess = scores.gather(1, chosen[owners, :1]).squeeze(1) - scores.mean(1)  # (T,)
    experts = chosen.tolist()
    weights = top.softmax(-1).tolist()
    probabilities = logits.softmax(-1).tolist()
    return [
        RouterScores(
            experts=experts[prompt],
            weights=weights[prompt],
            probabilities=probabilities[prompt],
            telling_token=int(excess_of_prompt.argmax()),
        )
        for prompt, excess_of_prompt in enumerate(excess.split(owners.bincount().tolist()))
    ]


@torch.no_grad()
def choose(
    host: Any, prompts: Sequence[Sequence[int]], adapters: Sequence[RowAdapter]
) -> list[Choice]:
    choices = list[Choice]()
    rows_of: dict[str, list[int]] = {}
    for row, (adapter, _) in enumerate(zip(adapters, prompts, strict=True)):
        name, scale = name_and_scale(adapter)
        choices.append(Choice(name if name is None or scale == 1 else (name, scale)))
        if name is not None and is_routed(host, name):
            rows_of.setdefault(name, []).append(row)
    for name, rows in rows_of.items():
        adapter, read = host.adapter(name), [prompts[row] for row in rows]
        for part, states, owners in host.prompt_states(read, adapter.chooser.num_layers_read):
            for index, scores in zip(part, score_prompts(adapter, states, owners), strict=True):
                row = rows[index]
                chosen = _chosen_adapter(adapter, scores, name_and_scale(adapters[row])[1])
                shares = dict(zip(adapter.part_names, scores.probabilities, strict=True))
                token = read[index][-MAX_PROMPT:][scores.telling_token]
                choices[row] = Choice(chosen, shares, token)
    return choices


def _chosen_adapter(adapter: Adapter, scores: RouterScores, scale: float) -> RowAdapter:
    """Name the chosen experts as a row's adapter, in hundredths, so that rows share sums."""
    names = [f"{adapter.name}/{adapter.part_names[expert]}" for expert in scores.experts]
    weights = round_shares(scores.weights)
    weighted = [pair for pair in zip(names, weights, strict=True) if pair[1]]
    chosen = weighted[0][0] if len(weighted) == 1 else write_sum(weighted)
    return chosen if scale == 1 else (chosen, scale)


def round_shares(shares: Sequence[float]) -> list[float]:
    """Round shares to hundredths that sum to 1, by largest remainders; their order stays."""
    exact = [100 * share / sum(shares) for share in shares]
    hundredths = [math.floor(value) for value in exact]
    missing = 100 - sum(hundredths)
    rank = lambda place: (hundredths[place] - exact[place], -shares[place])  # noqa: E731
    for place in sorted(range(len(exact)), key=rank)[:missing]:
        hundredths[place] += 1
    return [number / 100 for number in hundredths]


def batches_of(
    prompts: Sequence[Sequence[int]], vocab_size: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Cut prompts into batches of like lengths: places, token ids padded on the right, a mask."""
    if any(not prompt or not 0 <= min(prompt) <= max(prompt) < vocab_size for prompt in prompts):
        raise DataError(f"a prompt must have tokens from 0 to {vocab_size - 1}, got none or others")
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    while order:
        length = min(len(prompts[order[0]]), MAX_PROMPT)
        count = max(1, MAX_TOKENS // length)
        places, order = order[:count], order[count:]
        cut = [torch.tensor([*prompts[place]][-MAX_PROMPT:]) for place in places]
        mask = (torch.tensor([*map(len, cut)])[:, None] > torch.arange(length)).long()
        yield places, pad_sequence(cut, batch_first=True), mask


def padding_mask(
    input_ids: Tensor, defaults: GenerationConfig, settings: Mapping[str, Any]
) -> Tensor | None:
    """Infer the mask as transformers' `generate` does where it is passed none; None: all ones."""
    configs = [settings.get("generation_config"), defaults]
    pad, eos = settings.get("pad_token_id"), settings.get("eos_token_id")
    for config in filter(None, configs):
        pad = config.pad_token_id if pad is None else pad
        eos = config.eos_token_id if eos is None else eos
    ends = eos if isinstance(eos, list) else [eos]
    return None if pad is None or pad in ends else input_ids.ne(pad).long()


@contextmanager
def output_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Take what a layer computes, and end the forward with it."""
    found: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Enough

    hook = layer.register_forward_hook(keep)
    try:
        with suppress(_Enough):
            yield found
    finally:
        hook.remove()
