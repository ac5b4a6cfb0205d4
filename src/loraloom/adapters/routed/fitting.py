"""Fitting a router by prompt to prompts of each expert's kind, in seconds.

Axes: T tokens of all prompts, D hidden, B prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraloom.adapters.routed.choice import ReadStates
from loraloom.adapters.routed.prompt_router import PromptRouter
from loraloom.errors import DataError

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


def fit_to_prompts(
    router: PromptRouter,
    prompts: Mapping[str, Sequence[Sequence[int]]],
    read_states: ReadStates,
    *,
    experts: Sequence[str],
    only: Sequence[str],
    seed: int,
) -> RouterFit:
    """Fit a router to the token IDs of each expert's prompts; see `fit_router`."""
    for name in (*experts, *prompts, *only):
        num_prompts = len(prompts.get(name, ()))
        if name not in experts or num_prompts < 2:
            raise DataError(
                f"prompts must have two or more for each expert ({', '.join(experts)}) and none "
                f"for others, got {num_prompts} for {name}"
            )
    fitted = [expert for expert, row in zip(experts, router.router, strict=True) if row.any()]
    missing = [expert for expert in experts if expert not in fitted]
    if not only or not set(missing) <= set(only):
        raise DataError(
            "only must name experts, among them those whose part is not fitted yet "
            f"({', '.join(missing) or 'none'}), got {', '.join(only) or 'none'}"
        )
    rows = [experts.index(name) for name in only]
    examples = _read([prompts[name] for name in experts], router.num_layers_read, read_states)
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


def _read(
    prompts: Sequence[Sequence[Sequence[int]]], num_layers: int, read_states: ReadStates
) -> _Examples:
    """Read each expert's prompts batch by batch, and number them in this order."""
    ids = list[Sequence[int]]()
    labels = list[int]()
    for expert, prompts_of_expert in enumerate(prompts):
        ids += prompts_of_expert
        labels += [expert] * len(prompts_of_expert)
    targets = list[int]()
    states = list[Tensor]()
    owners = list[Tensor]()
    for indices, states_of_batch, numbers in read_states(ids, num_layers):
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
