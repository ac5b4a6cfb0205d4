"""Completions of prompts of several adapters: requests to an engine that nobody else uses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from loraloom.config.data import PromptForm
from loraloom.errors import DataError, not_finite
from loraloom.generation.engine import Engine
from loraloom.generation.limits import EngineLimits, NotFiniteError
from loraloom.generation.prompts import Prompt, check_token_ids, encode_prompt, form_for
from loraloom.generation.sampling import SamplingConfig
from loraloom.generation.sequence import Event, Failure, GenerationRequest, Row
from loraloom.models.host import Host
from loraloom.models.layout import RowAdapter, name_and_scale


@dataclass(frozen=True)
class Completion:
    """What was generated for a prompt.

    Args:
        prompt_ids: Tokens that were read.
        ids: Tokens that were generated, with the one that ended them if any did.
        text: Without stop texts, the end token and special tokens.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str


def generate(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    batch_size: int = 16,
    raw: bool = False,
    prompt_form: PromptForm | None = None,
) -> list[str]:
    """Complete prompts, each with its adapter.

    Args:
        host: With the adapters that the prompts name.
        tokenizer: The base model's.
        prompts: In any order.
        sampling: How tokens are chosen.
        batch_size: Most prompts at once.
        raw: Read texts as they stand, without a template.
        prompt_form: How all prompts are written. By default as each adapter's training data was
            (`host.adapters[name].prompt`); where nobody knows, and for the base model, in the
            tokenizer's chat template.

    Returns:
        The completions in the order of the prompts, without stop texts and special tokens.

    Raises:
        DataError: If a prompt is empty, leaves no room for `max_new_tokens`, or doesn't fit into
            memory even alone.
        AdapterError: If a prompt names an adapter that the host lacks, or whose weights have become
            infinite or NaN.
    """
    completions = generate_tokens(
        host,
        tokenizer,
        prompts,
        sampling,
        batch_size=batch_size,
        raw=raw,
        prompt_form=prompt_form,
    )
    return [completion.text for completion in completions]


def generate_tokens(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    batch_size: int = 16,
    raw: bool = False,
    prompt_form: PromptForm | None = None,
) -> list[Completion]:
    """Complete prompts as `generate` does, and return tokens too."""
    encoded, continues = _encode(host, tokenizer, prompts, sampling, raw, prompt_form)
    names = [prompt.adapter for prompt in prompts]
    return complete(
        host, tokenizer, encoded, names, sampling, continues=continues, batch_size=batch_size
    )


def complete_in_order(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    batch_size: int,
    num_done: int,
    raw: bool = False,
    prompt_form: PromptForm | None = None,
) -> Iterator[list[Completion]]:
    """Complete prompts as `generate` does, but in their own order, each batch when it is asked for.

    All prompts are checked before the first batch. Batches that have been had before can be left
    out; the others are what they would have been.
    """
    encoded, continues = _encode(host, tokenizer, prompts, sampling, raw, prompt_form)
    places = range(len(prompts))
    batches = [places[start : start + batch_size] for start in places[num_done::batch_size]]
    return (
        complete(
            host,
            tokenizer,
            [encoded[place] for place in batch],
            [prompts[place].adapter for place in batch],
            sampling,
            continues=[continues[place] for place in batch],
            keys=batch,
            batch_size=batch_size,
        )
        for batch in batches
    )


def complete(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[list[int]],
    adapters: Sequence[RowAdapter],
    sampling: SamplingConfig,
    *,
    continues: Sequence[bool] | None = None,
    keys: Sequence[int] | None = None,
    batch_size: int = 16,
    on_progress: Callable[[int], object] = lambda num_done: None,
) -> list[Completion]:
    """Complete prompts that are token ids and fit the model, at most `batch_size` at once.

    Draws follow from the seed and a prompt's key, which is its place unless `keys` says others.
    `on_progress` is told how many prompts are done.
    """
    limits = EngineLimits(
        max_rows=batch_size,
        cache_tokens=batch_size * host.config.max_position_embeddings,
        prefill_tokens=2**62,
        max_waiting=len(encoded) + 1,
        max_request_s=math.inf,
        prompt_cache="off",
    )
    engine = Engine(host, tokenizer, limits)
    texts = [""] * len(encoded)
    failures: dict[int, Exception] = {}

    def take(place: int, event: Event) -> None:
        if isinstance(event, Failure):
            failures[place] = event.error
        else:
            texts[place] += event.text

    rows: dict[int, Row] = {}
    for place in sorted(range(len(encoded)), key=lambda place: -len(encoded[place])):
        request = GenerationRequest(
            encoded[place],
            adapters[place],
            owner="",  # one queue for all
            sampling=sampling,
            place=place if keys is None else keys[place],
            continues=continues is not None and continues[place],
        )
        rows[place] = engine.submit(request, partial(take, place))
    num_done = 0
    while not engine.is_idle:
        engine.step()
        if failures:
            raise _first(failures, adapters)
        if len(rows) - engine.num_open > num_done:
            num_done = len(rows) - engine.num_open
            on_progress(num_done)
    return [
        Completion(list(ids), rows[place].new_ids, texts[place])
        for place, ids in enumerate(encoded)
    ]


def _first(failures: Mapping[int, Exception], adapters: Sequence[RowAdapter]) -> Exception:
    """The first error, or one for all adapters whose weights are broken."""
    broken = [place for place, error in failures.items() if isinstance(error, NotFiniteError)]
    if not broken:
        return next(iter(failures.values()))
    names = (name_and_scale(adapters[place])[0] for place in sorted(broken))
    return not_finite("logits", "NaN", dict.fromkeys(names))


def _encode(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    raw: bool,
    form: PromptForm | None,
) -> tuple[list[list[int]], list[bool]]:
    """Encode prompts and check that they leave room; also whether each one's text continues."""
    encoded = [
        encode_prompt(tokenizer, prompt, form or form_for(host, prompt.adapter), raw=raw)
        for prompt in prompts
    ]
    ids = [prompt.ids for prompt in encoded]
    _check_lengths(host, prompts, ids, sampling.max_new_tokens)
    return ids, [prompt.continues for prompt in encoded]


def _check_lengths(
    host: Host, prompts: Sequence[Prompt], encoded: Sequence[list[int]], max_new_tokens: int
) -> None:
    room = host.config.max_position_embeddings - max_new_tokens
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) > room:
            raise DataError(
                f"{prompt.origin}: the prompt must have at most {max(room, 0)} tokens, so that "
                f"{max_new_tokens} new ones fit the model's "
                f"{host.config.max_position_embeddings}, got {len(ids)}; "
                "shorten it or lower max_new_tokens"
            )
        check_token_ids(ids, host.config.vocab_size, prompt.origin)
