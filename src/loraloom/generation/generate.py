"""Completions of prompts of several adapters, and conversations: requests to an engine."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from transformers import PreTrainedTokenizerBase

from loraloom.config.data import PromptForm
from loraloom.data.templates import Message
from loraloom.errors import DataError, not_finite
from loraloom.generation.engine import Engine
from loraloom.generation.prompts import Prompt, check_token_ids, encode_prompt, form_for
from loraloom.generation.sampling import SamplingConfig
from loraloom.generation.scheduler import EngineLimits
from loraloom.generation.sequence import Event, Failure, GenerationRequest, NotFiniteError, Row
from loraloom.models.host import Host


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
    requests = _requests(host, tokenizer, prompts, sampling, raw, prompt_form)
    return complete(host, tokenizer, requests, batch_size=batch_size)


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
    requests = _requests(host, tokenizer, prompts, sampling, raw, prompt_form)
    starts = range(0, len(prompts), batch_size)[num_done // batch_size :]
    batches = (requests[start : start + batch_size] for start in starts)
    return (complete(host, tokenizer, batch, batch_size=batch_size) for batch in batches)


def _requests(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    raw: bool,
    form: PromptForm | None,
) -> list[GenerationRequest]:
    length, num_new = host.config.max_position_embeddings, sampling.max_new_tokens
    requests = []
    for place, prompt in enumerate(prompts):
        own_form = form or form_for(host, prompt.adapter)
        ids, continues = encode_prompt(tokenizer, prompt, own_form, raw=raw)
        if len(ids) > length - num_new:
            raise DataError(
                f"{prompt.origin}: the prompt must have at most {max(length - num_new, 0)} tokens, "
                f"so that {num_new} new ones fit the model's {length}, got {len(ids)}; shorten it "
                "or lower max_new_tokens"
            )
        check_token_ids(ids, host.config.vocab_size, prompt.origin)
        requests.append(
            GenerationRequest(ids, prompt.adapter, "", sampling, place, continues=continues)
        )
    return requests


def complete(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    *,
    batch_size: int = 16,
) -> list[Completion]:
    """Complete prompts that fit the model, at most `batch_size` at once."""
    limits = EngineLimits(
        max_rows=batch_size,
        cache_tokens=batch_size * host.config.max_position_embeddings,
        prefill_tokens=2**62,
        max_waiting=len(requests) + 1,
        max_request_s=math.inf,
        prompt_cache="off",
    )
    engine = Engine(host, tokenizer, limits)
    texts = [""] * len(requests)
    failures: dict[int, Exception] = {}

    def take(place: int, event: Event) -> None:
        if isinstance(event, Failure):
            failures[place] = event.error
        else:
            texts[place] += event.text

    rows: dict[int, Row] = {}
    # the longest first, so that rows of a batch end together
    for place in sorted(range(len(texts)), key=lambda place: -len(requests[place].prompt_ids)):
        rows[place] = engine.submit(requests[place], partial(take, place))
    while engine.step() or failures:
        broken = [place for place in failures if isinstance(failures[place], NotFiniteError)]
        if broken:
            names = (requests[place].adapter_name for place in sorted(broken))
            raise not_finite("logits", "NaN", dict.fromkeys(names))
        if failures:
            raise next(iter(failures.values()))
    return [
        Completion(list(request.prompt_ids), rows[place].new_ids, texts[place])
        for place, request in enumerate(requests)
    ]


@dataclass
class Turn:
    """What the user said, and what each model answered."""

    said: str
    answers: dict[str, str] = field(default_factory=dict)


@dataclass
class Conversation:
    """Turns of a user and of models, one of which is the base model.

    A model that joins later reads the answers of those that were asked before.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    base_name: str = "base"
    system: str | None = None
    raw: bool = False
    turns: list[Turn] = field(default_factory=list)

    def ask(
        self, text: str, models: Sequence[str], sampling: SamplingConfig
    ) -> Iterator[tuple[str, str]]:
        """Say something to models, and give their answers in pieces, one model after the other.

        They answer together; the pieces of the later ones are kept until it is their turn. An
        answer whose reader stops early is remembered as far as it was read.
        """
        turn = Turn(text)
        requests = {model: self._request(model, turn, sampling) for model in models}
        events: dict[str, deque[Event]] = {model: deque() for model in models}
        rows = []
        try:
            for model in models:
                rows.append(self.engine.submit(requests[model], events[model].append))
            self.turns.append(turn)
            for model in models:
                is_open = True
                while is_open:
                    while not events[model]:
                        self.engine.step()
                    event = events[model].popleft()
                    if isinstance(event, Failure):
                        raise event.error
                    turn.answers[model] = turn.answers.get(model, "") + event.text
                    yield model, event.text
                    is_open = event.finish_reason is None
        finally:
            for row in rows:
                row.is_cancelled = True
            while self.engine.step():
                pass

    def _request(self, model: str, turn: Turn, sampling: SamplingConfig) -> GenerationRequest:
        """What a model reads: all turns, or the last one alone where its prompts have no turns."""
        adapter = None if model == self.base_name else model
        form = form_for(self.engine.host, adapter)
        has_turns = self.tokenizer.chat_template if form is None else not form.is_text
        content: str | tuple[Message, ...] = turn.said
        if has_turns and not self.raw:
            messages: list[Message] = []
            if self.system is not None:
                messages.append({"role": "system", "content": self.system})
            for former in self.turns:
                # of the model that was asked, where this one was not
                answer = former.answers.get(model) or next(iter(former.answers.values()), "")
                messages.append({"role": "user", "content": former.said})
                messages.append({"role": "assistant", "content": answer})
            content = (*messages, {"role": "user", "content": turn.said})
        prompt = encode_prompt(self.tokenizer, Prompt(content), form, raw=self.raw)
        room = max(1, self.engine.max_length - len(prompt.ids))
        shortened = {"max_new_tokens": min(sampling.max_new_tokens, room)}
        return GenerationRequest(
            prompt.ids,
            adapter,
            model,
            sampling.model_copy(update=shortened),
            continues=prompt.continues,
        )
