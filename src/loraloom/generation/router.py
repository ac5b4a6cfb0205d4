"""Routers by prompt are fitted to texts, token IDs or sources of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from transformers import PreTrainedTokenizerBase

from loraloom.adapters.routed.fitting import RouterFit, fit_to_prompts
from loraloom.adapters.routed.method import prompt_router_of
from loraloom.config.data import MAX_LENGTH, SourceConfig
from loraloom.config.fields import checked
from loraloom.data.encoding import SourceEncoder
from loraloom.errors import AdapterError, DataError, shown
from loraloom.generation.prompts import Prompt, encode_for_choice
from loraloom.host.choice import prompt_states
from loraloom.host.host import Host

# Of an expert: texts, token ids, or where a source has them.
Prompts = Sequence[str | Sequence[int]] | SourceConfig | Mapping[str, object]


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
    only = experts if only is None else only
    return fit_to_prompts(
        router, ids, partial(prompt_states, host), experts=experts, only=only, seed=seed
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
