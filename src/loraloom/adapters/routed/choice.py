"""Which of its experts a routed adapter chooses for whole prompts, by the base model's states.

Axes: T tokens of all prompts, D hidden, B prompts, E experts, K top_k.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from loraloom.adapters.contract import Adapter
from loraloom.adapters.routed.method import prompt_router_of
from loraloom.adapters.routed.prompt_router import PromptRouter
from loraloom.adapters.weighted_sum import write_sum
from loraloom.errors import not_finite
from loraloom.ops.token_loss import is_broken

# Tokens of a prompt that are read: its last ones.
MAX_PROMPT = 512
# Reads prompts' states after some decoder layers, as `loraloom.host.choice.prompt_states`.
ReadStates = Callable[..., Iterator[tuple[Sequence[int], Tensor, Tensor]]]


class Choice(NamedTuple):
    """What answers a prompt, and where a router has chosen, how sure it was and why."""

    adapter: str | tuple[str, float] | None  # as a row's
    probabilities: Mapping[str, float] | None = None  # of all experts
    telling_token: int = 0  # which speaks for the expert most


def choose_experts(
    adapter: Adapter, prompts: Sequence[Sequence[int]], read_states: ReadStates
) -> list[Choice]:
    """Choose what answers each prompt, in the order of the prompts."""
    router = prompt_router_of(adapter)
    assert router is not None
    choices: dict[int, Choice] = {}
    for indices, states, owners in read_states(prompts, router.num_layers_read):
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
