"""Routers by prompt, fitted to prompts of each expert's kind in seconds.

Axes: T tokens of all prompts, D hidden.
"""

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
    """Results on held-out prompts: the chosen experts, by the expected one of those fitted."""

    chosen: Mapping[str, Mapping[str, int]]

    @property
    def accuracy(self) -> float:
        right = sum(of.get(name, 0) for name, of in self.chosen.items())
        return right / sum(sum(of.values()) for of in self.chosen.values())


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
        only: Experts whose part of the router is fitted; the rest is unchanged.
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
    read = {own: prompt_ids(host, tokenizer, of, name, limit) for own, of in prompts.items()}
    fitted = experts if only is None else [*only]
    if odd := [one for one in experts if len(read.get(one, ())) < 2] + [
        one for one in (*read, *fitted) if one not in experts
    ]:
        raise DataError(
            f"prompts must have two or more for each expert ({', '.join(experts)}) and none for "
            f"others, got {len(read.get(odd[0], ()))} for {odd[0]}"
        )
    unfitted = (one for one, row in zip(experts, chooser.router, strict=True) if not row.any())
    missing = [one for one in unfitted if one not in fitted]
    if missing or not fitted:
        raise DataError(
            "only must name experts, among them those whose part is not fitted yet "
            f"({', '.join(missing) or 'none'}), got {', '.join(fitted) or 'none'}"
        )
    labels = [number for number, expert in enumerate(experts) for _ in read[expert]]
    ids = [prompt for expert in experts for prompt in read[expert]]
    places, states, owners = _read(host, ids, chooser.num_layers_read)
    targets = torch.tensor([labels[place] for place in places], device=states.device)
    generator, held_out = torch.Generator().manual_seed(seed), torch.zeros(len(ids)).bool()
    for number in range(len(experts)):
        own = (targets.cpu() == number).nonzero().squeeze(1)
        own = own[torch.randperm(len(own), generator=generator)]
        held_out[own[: max(1, round(HELD_OUT * len(own)))]] = True
    held_out = held_out.to(states.device)
    rows = [experts.index(one) for one in fitted]
    chooser.fit(*_part(states, owners, ~held_out), targets[~held_out], rows)
    with torch.no_grad():
        found = chooser(*_part(states, owners, held_out)).argmax(1).tolist()
    chosen = {expert: Counter[str]() for expert in fitted}
    for label, choice in zip(targets[held_out].tolist(), found, strict=True):
        if label in rows:  # the parts of others were fitted to their own before
            chosen[experts[int(label)]][experts[int(choice)]] += 1
    chooser.fit(states, owners, targets, rows)
    return RouterFit(chosen)


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
