"""Fitting a router by prompt to prompts of each expert's kind, in seconds.

Axes: T tokens of all prompts, D hidden, B prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.routed.method import prompt_router_of
from loraloom.adapters.routed.prompt_router import PromptRouter
from loraloom.config.data import MAX_LENGTH, SourceConfig
from loraloom.config.fields import checked
from loraloom.data.encoding import SourceEncoder
from loraloom.errors import AdapterError, DataError, shown
from loraloom.generation.prompts import Prompt, encode_for_choice
from loraloom.host.choice import prompt_states
from loraloom.host.host import Host

# Of an expert: texts, token ids, or where a source has them.
Prompts = Sequence[str | Sequence[int]] | SourceConfig | Mapping[str, object]
# The share of each expert's prompts by which a router is judged before it is fitted to all.
HELD_OUT = 0.2


@dataclass(frozen=True)
class RouterFit:
    """Results on held-out prompts: the chosen experts, by the expected one.

    `before` is of the experts that were fitted before, which may have learned these prompts.
    """

    chosen: Mapping[str, Mapping[str, int]]
    before: RouterFit | None = None

    @property
    def accuracy(self) -> float:
        num_correct = 0
        num_prompts = 0
        for expert, counts in self.chosen.items():
            num_correct += counts.get(expert, 0)
            num_prompts += sum(counts.values())
        return num_correct / num_prompts

    @property
    def accuracies(self) -> dict[str, float]:
        """Accuracy on the prompts of each expert."""
        return {
            name: counts.get(name, 0) / sum(counts.values()) for name, counts in self.chosen.items()
        }


@dataclass(frozen=True)
class _Examples:
    """What a router reads of prompts, and the experts that it is to choose."""

    states: Tensor  # of all tokens, [T, D]
    owners: Tensor  # the number of each token's prompt, [T]
    targets: Tensor  # the number of each prompt's expert, [B]

    def select(self, mask: Tensor) -> _Examples:
        """Take some prompts' tokens, and number these prompts from 0."""
        is_kept = mask[self.owners]
        numbers = mask.cumsum(0) - 1
        owners = numbers[self.owners[is_kept]]
        return _Examples(self.states[is_kept], owners, self.targets[mask])


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
    router = prompt_router_of(adapter)
    if router is None:
        raise AdapterError(
            f"fit_router requires router: prompt, got adapter {name!r}, {adapter.config.title}"
        )
    ids = {key: prompt_ids(host, tokenizer, value, name, limit) for key, value in prompts.items()}
    experts = list(adapter.members)
    fitted = [expert for expert, row in zip(experts, router.router, strict=True) if row.any()]
    only = experts if only is None else only
    _check_experts(ids, experts=experts, fitted=fitted, only=only)
    rows = [experts.index(expert) for expert in only]
    examples = _read(host, [ids[expert] for expert in experts], router.num_layers_read)
    is_held_out = _hold_out(examples.targets.cpu(), seed).to(examples.targets.device)
    held_out = examples.select(is_held_out)
    before = None
    if fitted:
        before = RouterFit(_count_choices(router, held_out, experts, fitted))
    training = examples.select(~is_held_out)
    router.fit(training.states, training.owners, training.targets, rows)
    chosen = _count_choices(router, held_out, experts, experts)
    router.fit(examples.states, examples.owners, examples.targets, rows)
    return RouterFit(chosen, before)


def _check_experts(
    prompts: Mapping[str, Sequence[Sequence[int]]],
    *,
    experts: Sequence[str],
    fitted: Sequence[str],
    only: Sequence[str],
) -> None:
    for name in (*experts, *prompts, *only):
        num_prompts = len(prompts.get(name, ()))
        if name not in experts or num_prompts < 2:
            raise DataError(
                f"prompts must have two or more for each expert ({', '.join(experts)}) and none "
                f"for others, got {num_prompts} for {name}"
            )
    missing = [expert for expert in experts if expert not in fitted]
    if not only or not set(missing) <= set(only):
        raise DataError(
            "only must name experts, among them those whose part is not fitted yet "
            f"({', '.join(missing) or 'none'}), got {', '.join(only) or 'none'}"
        )


def prompt_ids(
    host: Host, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, name: str, limit: int | None
) -> Sequence[Sequence[int]]:
    """Token ids of prompts, as they are read when the router chooses."""
    if isinstance(prompts, str):
        raise DataError(
            "prompts must be a list of texts or of token ids, or a source, {'task': 'arc_easy'}, "
            f"got the text {shown(prompts)}"
        )
    ids = list[Sequence[int]]()
    if not isinstance(prompts, SourceConfig | Mapping):
        for prompt in prompts:
            if isinstance(prompt, str):
                ids.append(encode_for_choice(host, tokenizer, Prompt(prompt, name)))
            else:
                ids.append(prompt)
        return ids
    adapter = host.adapter(name)
    systems = set[str | None]()  # of the experts' forms, which are written when one is chosen
    if adapter.forms_differ:
        systems = {member.prompt.system for member in adapter.members.values() if member.prompt}
    encoder = SourceEncoder(checked(SourceConfig, prompts), tokenizer, MAX_LENGTH)
    for fields in encoder.prompts("train", limit):
        prompt = Prompt(adapter=name, **fields)
        if isinstance(prompt.content, str):
            texts = [prompt.content, prompt.fields.get("input")]
        else:
            turns = [turn for turn in prompt.content if turn.get("content") not in systems]
            texts = [turn.get("content") for turn in turns if turn["role"] == "user"]
            prompt = replace(prompt, content=tuple(turns))
        if any(texts):
            ids.append(encode_for_choice(host, tokenizer, prompt))
    return ids


def _read(host: Host, prompts: Sequence[Sequence[Sequence[int]]], num_layers: int) -> _Examples:
    """Read each expert's prompts batch by batch, and number them in this order."""
    ids = list[Sequence[int]]()
    labels = list[int]()
    for expert, prompts_of_expert in enumerate(prompts):
        ids += prompts_of_expert
        labels += [expert] * len(prompts_of_expert)
    targets = list[int]()
    states = list[Tensor]()
    owners = list[Tensor]()
    for indices, states_of_batch, numbers in prompt_states(host, ids, num_layers):
        states.append(states_of_batch)
        owners.append(numbers + len(targets))
        targets += [labels[index] for index in indices]
    device = states[0].device
    return _Examples(torch.cat(states), torch.cat(owners), torch.tensor(targets, device=device))


def _hold_out(targets: Tensor, seed: int) -> Tensor:
    """Choose a share of each expert's prompts, one or more: True in the mask, [B]."""
    generator = torch.Generator().manual_seed(seed)
    is_held_out = torch.zeros_like(targets, dtype=torch.bool)
    for expert in targets.unique():
        rows = (targets == expert).nonzero().squeeze(1)
        order = torch.randperm(len(rows), generator=generator)
        num_held_out = max(1, round(HELD_OUT * len(rows)))
        is_held_out[rows[order[:num_held_out]]] = True
    return is_held_out


@torch.no_grad()
def _count_choices(
    router: PromptRouter, examples: _Examples, experts: Sequence[str], candidates: Sequence[str]
) -> dict[str, Counter[str]]:
    """Count what prompts of some experts get, if the router chooses among these."""
    columns = [experts.index(name) for name in candidates]
    logits = router.logits(examples.states, examples.owners)[:, columns]
    choices = logits.argmax(1).tolist()
    chosen = {name: Counter[str]() for name in candidates}
    for target, choice in zip(examples.targets.tolist(), choices, strict=True):
        expected = experts[int(target)]
        if expected in chosen:
            chosen[expected][candidates[int(choice)]] += 1
    return chosen
