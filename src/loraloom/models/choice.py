"""Which of its adapters a routed one chooses for a whole prompt, by the base model's states.

Axes: B prompts, L tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loraloom.adapters.weighted_sum import write_sum
from loraloom.errors import DataError
from loraloom.models.layout import RowAdapter, name_and_scale

# Tokens of a forward, and of a prompt those that are read: its last ones.
MAX_TOKENS, MAX_PROMPT = 8192, 512


class Choice(NamedTuple):
    """What answers a prompt, and the probabilities of all experts where a router has chosen."""

    adapter: RowAdapter
    probabilities: Mapping[str, float] | None = None


class _Enough(Exception):  # noqa: N818, it is none
    """The states that were asked for are there."""


@torch.no_grad()
def choose(
    host: Any, prompts: Sequence[Sequence[int]], adapters: Sequence[RowAdapter]
) -> list[Choice]:
    choices = [Choice(adapter) for adapter in adapters]
    places: dict[str, list[int]] = {}
    for place, adapter in enumerate(adapters):
        name, _ = name_and_scale(adapter)
        if name is not None and host.adapter(name).num_layers_read is not None:
            places.setdefault(name, []).append(place)
    for name, own in places.items():
        router, read = host.adapter(name), [prompts[place] for place in own]
        experts, count = router.part_names, router.config.experts_per_token
        for part, states, mask in host.prompt_states(read, router.num_layers_read):
            logits = router.judge_parts(states, mask)  # (B, E)
            top, chosen = logits.topk(count)
            rows = zip(
                part,
                top.softmax(-1).tolist(),
                chosen.tolist(),
                logits.softmax(-1).tolist(),
                strict=True,
            )
            for at, weights, numbers, probabilities in rows:
                _, scale = name_and_scale(adapters[own[at]])
                names = [f"{name}/{experts[number]}" for number in numbers]
                row: Any = (names[0], scale) if scale != 1 else names[0]
                if len(names) > 1:
                    row = write_sum([(n, w * scale) for n, w in zip(names, weights, strict=True)])
                choices[own[at]] = Choice(row, dict(zip(experts, probabilities, strict=True)))
    return choices


def batches_of(
    prompts: Sequence[Sequence[int]],
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Cut prompts into batches of like lengths: places, token ids padded on the right, a mask."""
    if any(not prompt for prompt in prompts):
        raise DataError("a prompt by which an adapter is chosen must have tokens, got none")
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    while order:
        length = min(len(prompts[order[0]]), MAX_PROMPT)
        count = max(1, MAX_TOKENS // length)
        places, order = order[:count], order[count:]
        cut = [list(prompts[place])[-MAX_PROMPT:] for place in places]
        ids = torch.tensor([one + [0] * (length - len(one)) for one in cut])
        yield (
            places,
            ids,
            torch.tensor([[place < len(one) for place in range(length)] for one in cut]),
        )


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
