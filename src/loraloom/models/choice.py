"""Which of its adapters a routed one chooses for a whole prompt, by the base model's states.

Axes: B prompts, E experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase

from loraloom.adapters.weighted_sum import write_sum
from loraloom.errors import DataError, not_finite
from loraloom.models.layout import RowAdapter, name_and_scale

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


@torch.no_grad()
def choose(
    host: Any, prompts: Sequence[Sequence[int]], adapters: Sequence[RowAdapter]
) -> list[Choice]:
    rows = [name_and_scale(one) for one in adapters]
    choices = [Choice(n if n is None or scale == 1 else (n, scale)) for n, scale in rows]
    places: dict[str, list[int]] = {}
    for place, ((name, _), _) in enumerate(zip(rows, prompts, strict=True)):
        if name is not None and is_routed(host, name):
            places.setdefault(name, []).append(place)
    for name, own in places.items():
        router, read = host.adapter(name), [prompts[place] for place in own]
        experts, count = router.part_names, router.config.experts_per_token
        for part, states, owners in host.prompt_states(read, router.chooser.num_layers_read):
            logits = router.chooser(states, owners)  # (B, E)
            if not logits.isfinite().all():
                raise not_finite("logits of its router", "infinite ones or NaN", [name])
            top, chosen = logits.topk(count)
            # of each token, by how much it speaks for the first more than for all on average
            scores = router.chooser.scores(states)  # (T, E)
            scores = scores.gather(1, chosen[owners, :1]) - scores.mean(1, keepdim=True)
            columns = (top.softmax(-1), chosen, logits.softmax(-1))
            by_prompt = scores.squeeze(1).split(owners.bincount().tolist())
            found = zip(part, by_prompt, *(one.tolist() for one in columns), strict=True)
            for at, scored, weights, numbers, shares in found:
                # of hundredths, so that rows share sums; the largest is the rest of 1
                others = [round(weight, 2) for weight in weights[1:]]
                rounded = zip(numbers, (round(1 - sum(others), 2), *others), strict=True)
                parts = [(f"{name}/{experts[number]}", w) for number, w in rounded if w]
                row = parts[0][0] if len(parts) == 1 else write_sum(parts)
                row = row if (scale := rows[own[at]][1]) == 1 else (row, scale)
                token = read[at][-MAX_PROMPT:][int(scored.argmax())]
                choices[own[at]] = Choice(row, dict(zip(experts, shares, strict=True)), token)
    return choices


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
