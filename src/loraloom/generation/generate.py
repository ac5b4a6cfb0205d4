"""Completions of prompts of several adapters, and conversations: requests to an engine."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from transformers import PreTrainedTokenizerBase

from loraloom.config.data import PromptForm
from loraloom.data.templates import Message
from loraloom.errors import ConfigError, DataError, shown
from loraloom.generation.engine import Engine
from loraloom.generation.prompts import Prompt, check_token_ids, read_prompts
from loraloom.generation.request import Event, GenerationRequest, Row
from loraloom.generation.sampling import SamplingConfig
from loraloom.generation.scheduler import EngineLimits
from loraloom.host.choice import Choice, describe_choice
from loraloom.host.host import Host


@dataclass(frozen=True)
class Completion:
    """A completion of a prompt.

    Args:
        prompt_ids: Token IDs of the prompt.
        ids: Generated token IDs, the end token included if there is one.
        text: Generated text without stop strings and special tokens.
        choice: Adapter that answered; if a router chose it, with its probabilities.
    """

    prompt_ids: list[int]
    ids: list[int]
    text: str
    choice: Choice


def generate(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt | str],
    sampling: SamplingConfig,
    *,
    batch_size: int = 16,
    raw: bool = False,
    prompt_form: PromptForm | None = None,
) -> list[str]:
    """Complete prompts, each with its adapter.

    Args:
        host: Base model with the adapters that the prompts name.
        tokenizer: Tokenizer of the base model.
        prompts: Prompts of any adapters, in any order. A string is a prompt of the base model.
        sampling: Sampling settings.
        batch_size: Maximum number of prompts in a batch.
        raw: Whether to read prompts without a template.
        prompt_form: Form of all prompts. By default, that of each adapter's training data
            (`host.adapters[name].prompt`); if it is not recorded, and for the base model, the
            tokenizer's chat template.

    Returns:
        The completions in the order of the prompts, without stop strings and special tokens.

    Raises:
        ConfigError: If prompts is a single string, or batch_size is below 1.
        DataError: If a prompt is empty, leaves no room for `max_new_tokens`, or does not fit into
            memory even alone.
        AdapterError: If a prompt names an adapter that the host lacks, or whose weights are not
            finite.
    """
    if isinstance(prompts, str):
        raise ConfigError(f"prompts must be a list, got {shown(prompts)}; put it into brackets")
    read = [Prompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    requests = make_requests(host, tokenizer, read, sampling, raw=raw, prompt_form=prompt_form)
    return [
        completion.text for completion in complete(host, tokenizer, requests, batch_size=batch_size)
    ]


def make_requests(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    *,
    raw: bool = False,
    prompt_form: PromptForm | None = None,
) -> list[GenerationRequest]:
    """Encode and check prompts; what is drawn for one follows from its place."""
    length, num_new = host.max_positions, sampling.max_new_tokens
    requests = []
    read = read_prompts(host, tokenizer, prompts, prompt_form, raw=raw)
    for index, (prompt, (ids, turn_end, choice)) in enumerate(zip(prompts, read, strict=True)):
        if len(ids) > length - num_new:
            raise DataError(
                f"{prompt.origin}: the prompt must have at most {max(length - num_new, 0)} tokens, "
                f"so that {num_new} new ones fit the model's {length}, got {len(ids)}; shorten it "
                "or lower max_new_tokens"
            )
        check_token_ids(ids, host.config.vocab_size, prompt.origin)
        requests.append(GenerationRequest(ids, choice, "", sampling, index, turn_end=turn_end))
    return requests


def complete(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[GenerationRequest],
    *,
    batch_size: int = 16,
) -> list[Completion]:
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    limits = EngineLimits(
        max_rows=batch_size,
        cache_tokens=batch_size * host.max_positions,
        prefill_tokens=2**62,
        max_waiting=len(requests) + 1,
        max_request_s=math.inf,
        keeps_prompts=False,
    )
    engine = Engine(host, tokenizer, limits)
    texts = [""] * len(requests)

    def take(index: int, event: Event) -> None:
        if isinstance(event, Exception):
            raise event  # through the step that it came in
        texts[index] += event.text

    rows: dict[int, Row] = {}
    # the longest first, so that rows of a batch end together
    for index in sorted(range(len(texts)), key=lambda index: -len(requests[index].prompt_ids)):
        rows[index] = engine.submit(requests[index], partial(take, index))
    while engine.step():
        pass
    completions = []
    for index, text in enumerate(texts):
        request = rows[index].request
        prompt_ids = list(request.prompt_ids)
        completions.append(Completion(prompt_ids, rows[index].new_ids, text, request.choice))
    return completions


@dataclass
class Conversation:
    """Turns of a user and of models (or the base), which read one another's answers."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    chosen: str | None = None
    """Which of a model's adapters answers, where a router has chosen it."""

    def ask(self, text: str, model: str, sampling: SamplingConfig) -> Iterator[str]:
        """Say something to a model, and give its answer in pieces."""
        # An answer whose reader stops early is remembered as far as it was read.
        question: Message = {"role": "user", "content": text}
        request = self._request(model, question, sampling)
        events: deque[Event] = deque()
        row = self.engine.submit(request, events.append)
        pieces: list[str] = []
        try:
            reason = None
            while reason is None:
                while not events:
                    self.engine.step()
                event = events.popleft()
                if isinstance(event, Exception):
                    raise event
                pieces.append(event.text)
                yield event.text
                reason = event.finish_reason
        finally:
            row.is_cancelled = True
            while self.engine.step():
                pass
            if pieces:  # else it failed
                self.turns.append(question)
                self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def _request(
        self, model: str, question: Message, sampling: SamplingConfig
    ) -> GenerationRequest:
        """What a model reads: all turns, or the last one alone where its prompts have no turns."""
        messages: list[Message] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        messages += [*self.turns, question]
        adapter = None if model == "base" else model
        prompt = Prompt(tuple(messages), adapter, last_alone=True)
        ((ids, turn_end, choice),) = read_prompts(self.engine.host, self.tokenizer, [prompt])
        description = describe_choice(choice, self.tokenizer)
        self.chosen = description["chosen"]["adapter"] if description else None
        room = max(1, self.engine.max_length - len(ids))
        num_new = min(sampling.max_new_tokens, room)
        sampling = sampling.model_copy(update={"max_new_tokens": num_new})
        place = self.engine.counts["steps",]  # another draw for each turn
        return GenerationRequest(ids, choice, model, sampling, place, turn_end=turn_end)
