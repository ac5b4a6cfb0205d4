"""Completions of prompts of several adapters, in batches.

Axes: B rows, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

from loraloom.config.data import PromptForm
from loraloom.data.tokenising import NUM_BEFORE, text_after
from loraloom.errors import DataError, not_finite
from loraloom.infer.halving import in_halves
from loraloom.infer.prompts import Prompt, encode_prompt, form_for
from loraloom.infer.sampling import SamplingConfig, StopTexts, TokenChooser, before_stop
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
        batch_size: Most prompts at once; they are batched by length.
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
    starts = range(num_done, len(prompts), batch_size)
    return (
        complete(
            host,
            tokenizer,
            encoded[start : start + batch_size],
            [prompt.adapter for prompt in prompts[start : start + batch_size]],
            sampling,
            continues=continues[start : start + batch_size],
            keys=range(len(prompts))[start : start + batch_size],
            batch_size=batch_size,
        )
        for start in starts
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
    on_progress: Callable[[int], object] | None = None,
) -> list[Completion]:
    """Complete prompts that are token ids and fit the model; see `generate`."""
    keys = range(len(encoded)) if keys is None else keys
    ends = end_tokens(host, tokenizer)
    completions: dict[int, Completion] = {}
    for places in _batches(encoded, adapters, batch_size):
        new_ids = in_halves(
            lambda part: _generate_batch(
                host,
                tokenizer,
                [encoded[place] for place in part],
                [adapters[place] for place in part],
                sampling,
                [keys[place] for place in part],
            ),
            places,
            lambda place: f"a prompt of {len(encoded[place])} tokens",
        )
        for place, ids in zip(places, new_ids, strict=True):
            before = encoded[place][-NUM_BEFORE:] if continues and continues[place] else []
            text = text_after(tokenizer, before, _until(ids, ends))
            completions[place] = Completion(
                list(encoded[place]), ids, before_stop(text, sampling.stop)
            )
        if on_progress is not None:
            on_progress(len(completions))
    return [completions[place] for place in range(len(encoded))]


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


def check_token_ids(ids: Sequence[int], vocab_size: int, origin: str) -> None:
    """Refuse what the embedding has no row for, which a GPU would not get over."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise DataError(
            f"{origin}: the text must have tokens of the model, whose ids are below {vocab_size}, "
            f"got {largest}; leave the special token of this id out"
        )


def _batches(
    encoded: Sequence[list[int]], adapters: Sequence[RowAdapter], batch_size: int
) -> Iterator[list[int]]:
    """Cut the prompts' places into batches of like lengths, each adapter's rows together."""
    order = sorted(range(len(encoded)), key=lambda place: -len(encoded[place]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        yield sorted(batch, key=lambda place: (str(adapters[place] or ""), place))


def _generate_batch(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    names: Sequence[RowAdapter],
    sampling: SamplingConfig,
    keys: Sequence[int],
) -> list[list[int]]:
    """Continue prompts together; a row leaves the batch when it has ended."""
    input_ids, attention_mask = _pad_left(rows, host.device)
    prompt_length = input_ids.shape[1]
    stops = StopTexts(tokenizer, sampling.stop, prompt_length) if sampling.stop else None
    ends = end_tokens(host, tokenizer)
    if sampling.num_beams > 1:
        return _search_beams(host, tokenizer, input_ids, attention_mask, names, sampling, stops)
    chooser = TokenChooser(sampling, keys, host.device)
    session = host.prefill(input_ids, attention_mask, names)
    _check_finite(names, session.logits)
    new_ids: list[list[int]] = [[] for _ in rows]
    alive = list(range(len(rows)))  # the session's rows
    while True:
        tokens = chooser.choose(input_ids, session.logits)
        input_ids = torch.cat([input_ids, tokens.unsqueeze(1)], dim=1)
        for row, token in zip(alive, tokens.tolist(), strict=True):
            new_ids[row].append(token)
        stopped = [False] * len(alive) if stops is None else stops(input_ids, None).tolist()
        staying = [
            place
            for place, row in enumerate(alive)
            if new_ids[row][-1] not in ends
            and not stopped[place]
            and len(new_ids[row]) < sampling.max_new_tokens
        ]
        if not staying:
            return new_ids
        if len(staying) < len(alive):
            alive = [alive[place] for place in staying]
            index = torch.tensor(staying, device=tokens.device)
            input_ids, tokens = input_ids[index], tokens[index]
            session.keep(staying)
            chooser.keep(staying)
        host.decode(session, tokens)


def _check_finite(names: Sequence[RowAdapter], logits: Tensor) -> Tensor:
    """Refuse to choose tokens by what is no number: broken weights give it from the start."""
    broken = logits.isnan().any(-1).tolist()
    owners = [
        name_and_scale(name)[0] for name, is_broken in zip(names, broken, strict=True) if is_broken
    ]
    if owners:
        raise not_finite("logits", "NaN", dict.fromkeys(owners))
    return logits


def _search_beams(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    attention_mask: Tensor,
    names: Sequence[RowAdapter],
    sampling: SamplingConfig,
    stops: StopTexts | None,
) -> list[list[int]]:
    """Continue prompts by transformers' beam search."""
    ends = end_tokens(host, tokenizer)
    beams = [name for name in names for _ in range(sampling.num_beams)]
    output = host.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        adapters=names,
        max_new_tokens=sampling.max_new_tokens,
        num_beams=sampling.num_beams,
        repetition_penalty=sampling.repetition_penalty,
        do_sample=False,
        temperature=1.0,  # these would be the model's own defaults
        top_k=50,
        top_p=1.0,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([lambda _, scores: _check_finite(beams, scores)]),
        stopping_criteria=StoppingCriteriaList([] if stops is None else [stops]),
    )
    return [
        _without_padding(ids[: len(_until(ids, ends)) + 1], tokenizer.pad_token_id, ends)
        for ids in output[:, input_ids.shape[1] :].tolist()
    ]


def _pad_left(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad prompts on the left, each with its own first token.

    Padding is masked; but transformers' repetition penalty reads it, and would count it as said.
    """
    length = max(map(len, rows))
    input_ids = [[row[0]] * (length - len(row)) + row for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(input_ids, device=device), torch.tensor(mask, device=device)


def end_tokens(host: Host, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a completion: those of the model's generation config, and EOS."""
    configured = host.model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})


def _until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids before the first end token."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def _without_padding(ids: list[int], pad_id: Any, ends: Sequence[int]) -> list[int]:
    """The ids without the padding that follows a stop text in a batch."""
    length = len(ids)
    while pad_id not in ends and length > 0 and ids[length - 1] == pad_id:
        length -= 1
    return ids[:length]
