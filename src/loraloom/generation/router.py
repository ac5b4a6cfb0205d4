"""Routers by prompt, fitted to prompts of each expert's kind in seconds.

Axes: T tokens of all prompts, D hidden.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import MAX_LENGTH, SourceConfig
from loraloom.config.fields import checked
from loraloom.data.encoding import SourceEncoder
from loraloom.errors import AdapterError, DataError, shown
from loraloom.generation.prompts import Prompt, encode_for_choice
from loraloom.host.host import Host

# The share of each expert's prompts by which a router is judged before it is fitted to all.
HELD_OUT = 0.2

# Of an expert: texts, token ids, or where a source has them.
Prompts = Sequence[str | Sequence[int]] | SourceConfig | Mapping[str, object]


@dataclass(frozen=True)
class RouterFit:
    """Results on held-out prompts: the chosen experts, by the expected one.

    `before` is of the experts that were fitted before, which may have learned these prompts.
    """

    chosen: Mapping[str, Mapping[str, int]]
    before: RouterFit | None = None

    @property
    def accuracy(self) -> float:
        correct = sum(counts.get(expert, 0) for expert, counts in self.chosen.items())
        return correct / sum(sum(counts.values()) for counts in self.chosen.values())

    @property
    def accuracies(self) -> dict[str, float]:
        """Accuracy on the prompts of each expert."""
        return {
            name: counts.get(name, 0) / sum(counts.values()) for name, counts in self.chosen.items()
        }


def fit_router(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    prompts: Mapping[str, Prompts],
    *,
    only: Sequence[str] | None = None,
    limit: int | None = 200,
    seed: int = 0,
) -> RouterFit:
    """Fit the router of a routed adapter, `router: prompt`, to prompts of each expert's kind.

    The base model reads the prompts once; then only the router trains, by cross-entropy. A fifth of
    each expert's prompts is held out to measure accuracy, and included in the final fit.

    Args:
        host: Base model with the routed adapter.
        tokenizer: Tokenizer of the base model.
        name: Name of the routed adapter.
        prompts: Prompts of each expert: strings, which are written in the adapter's form, lists of
            token IDs, or a source as under `data:` in a run file, of which `train` is read: what
            its rows ask, in the adapter's form, not by templates of the source.
        only: Experts whose part of the router is fitted; the rest is unchanged, and may lose
            prompts to these experts. Compare `accuracies` with `before.accuracies`.
        limit: Maximum number of rows of a source, from its beginning.
        seed: Random seed for the held-out prompts.

    Raises:
        AdapterError: If the adapter is not routed by prompt.
        DataError: If an expert does not exist, has fewer than two prompts, or would stay unfitted.
    """
    adapter = host.adapter(name)
    chooser = adapter.chooser
    if chooser is None:
        raise AdapterError(
            f"fit_router requires router: prompt, got adapter {name!r}, {adapter.config.title}"
        )
    experts = adapter.part_names
    read = {expert: prompt_ids(host, tokenizer, of, name, limit) for expert, of in prompts.items()}
    names = experts if only is None else [*only]
    if odd := [expert for expert in experts if len(read.get(expert, ())) < 2] + [
        expert for expert in (*read, *names) if expert not in experts
    ]:
        raise DataError(
            f"prompts must have two or more for each expert ({', '.join(experts)}) and none for "
            f"others, got {len(read.get(odd[0], ()))} for {odd[0]}"
        )
    fitted_before = [number for number, row in enumerate(chooser.router) if row.any()]
    rows = [experts.index(expert) for expert in names]
    missing = [experts[number] for number in range(len(experts)) if number not in fitted_before]
    if not rows or not {*missing} <= {*names}:
        raise DataError(
            "only must name experts, among them those whose part is not fitted yet "
            f"({', '.join(missing) or 'none'}), got {', '.join(names) or 'none'}"
        )
    labels = [number for number, expert in enumerate(experts) for _ in read[expert]]
    ids = [prompt for expert in experts for prompt in read[expert]]
    places, states, owners = _read(host, ids, chooser.num_layers_read)
    targets = torch.tensor([labels[place] for place in places])
    held_out = _hold_out(targets, seed).to(states.device)
    targets = targets.to(states.device)
    held_states, held_owners = _part(states, owners, held_out)

    def measure(candidates: Sequence[int]) -> dict[str, Counter[str]]:
        """Count what held-out prompts of some experts get, if the router chooses among these."""
        with torch.no_grad():
            choices = chooser.logits(held_states, held_owners)[:, candidates].argmax(1).tolist()
        chosen = {experts[number]: Counter[str]() for number in candidates}
        for target, choice in zip(targets[held_out].tolist(), choices, strict=True):
            if target in candidates:
                chosen[experts[int(target)]][experts[candidates[int(choice)]]] += 1
        return chosen

    before = RouterFit(measure(fitted_before)) if fitted_before else None
    chooser.fit(*_part(states, owners, ~held_out), targets[~held_out], rows)
    chosen = measure(range(len(experts)))
    chooser.fit(states, owners, targets, rows)
    return RouterFit(chosen, before)


def _hold_out(targets: Tensor, seed: int) -> Tensor:
    """Choose a share of each expert's prompts, one or more: True in the mask, [B]."""
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros_like(targets, dtype=torch.bool)
    for expert in targets.unique():
        rows = (targets == expert).nonzero().squeeze(1)
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held_out[rows[: max(1, round(HELD_OUT * len(rows)))]] = True
    return held_out


def prompt_ids(
    host: Host, tokenizer: PreTrainedTokenizerBase, given: Prompts, adapter: str, limit: int | None
) -> Sequence[Sequence[int]]:
    """Token ids of prompts, as they are read when the router chooses."""
    if isinstance(given, str):
        raise DataError(
            "prompts must be a list of texts or of token ids, or a source, {'task': 'arc_easy'}, "
            f"got the text {shown(given)}"
        )
    encode = partial(encode_for_choice, host, tokenizer)
    if not isinstance(given, SourceConfig | Mapping):
        return [encode(Prompt(one, adapter)) if isinstance(one, str) else one for one in given]
    source, own = checked(SourceConfig, given), host.adapter(adapter)
    forms = [part.prompt for part in own.parts[1:] if part.prompt and own.forms_differ]
    read = []
    for asked in SourceEncoder(source, tokenizer, MAX_LENGTH).prompts("train", limit):
        prompt = Prompt(adapter=adapter, **asked)
        texts = [prompt.content, prompt.fields.get("input")]
        if not isinstance(prompt.content, str):
            systems = {form.system for form in forms}  # which are written later
            kept = [one for one in prompt.content if one.get("content") not in systems]
            texts = [one.get("content") for one in kept if one["role"] == "user"]
            prompt = replace(prompt, content=tuple(kept))
        if any(texts):
            read.append(encode(prompt))
    return read


def _read(
    host: Host, ids: Sequence[Sequence[int]], num_layers: int
) -> tuple[list[int], Tensor, Tensor]:
    """The places of prompts as they are read, their tokens' states, [T, D], and owners, [T]."""
    places, states, owners = list[int](), [], []
    for part, own, numbers in host.prompt_states(ids, num_layers):
        states.append(own)
        owners.append(numbers + len(places))
        places += part
    return places, torch.cat(states), torch.cat(owners)


def _part(states: Tensor, owners: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Take some prompts' tokens, and number these anew."""
    kept = wanted[owners]
    return states[kept], (wanted.cumsum(0) - 1)[owners[kept]]
