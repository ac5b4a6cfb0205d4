"""What the engine is asked for, how far it has come, and what it tells on the way.

Axes: V vocabulary.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.data.tokens import NUM_BEFORE
from loraloom.errors import LoraloomError
from loraloom.generation.sampling import (
    JsonConstraint,
    SamplingConfig,
    TextStream,
    TokenLogProb,
    TokenRule,
)
from loraloom.host.choice import Choice
from loraloom.host.decoding import Decoding
from loraloom.host.layout import RowAdapter
from loraloom.ops.dropout import mix64
from loraloom.routing.record import RouterChoice

_log = logging.getLogger(__name__)

# An end token or a stop text came, or there is no room for more tokens.
FinishReason = Literal["stop", "length"]


class RequestError(LoraloomError):
    """A request is refused, or ends without a result; `code` says why to programs."""

    def __init__(self, message: str = "", code: str | None = None, *, param: str | None = None):
        super().__init__(message)
        self.code = code
        self.param = param


class Share(NamedTuple):
    """Whose turn a request uses up: the adapter's or base model's, of who asks."""

    tenant: str
    owner: str


@dataclass(frozen=True)
class GenerationRequest:
    """A completion to make."""

    prompt_ids: Sequence[int]
    choice: Choice
    """What answers, where a router has chosen it by the prompt with its experts' probabilities."""
    owner: str
    """The model's public name, under which it is counted."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    place: int = 0
    """Which of several completions of the prompt; draws follow from it and the seed."""
    num_logprobs: int | None = None
    """Most likely tokens to tell with each token; None tells no log-probabilities."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_end: bool = False
    constraint: JsonConstraint | None = None
    """What tokens may follow; it belongs to this request alone."""
    tells_routing: bool = False
    turn_end: str | None = ""
    """What ends the answer as a stop text does, perhaps nothing; None: it continues the prompt's
    text, with the space between them."""
    scores_prompt: bool = False
    """Tell the log-probabilities of the prompt's own tokens before those of new ones."""
    makes_tokens: bool = True
    """Whether tokens are generated; else the request ends when its prompt is read."""
    tenant: str = ""
    """Who asks, such as an API key; others share neither its turn nor its prompts."""
    arrived_s: float = field(default_factory=time.monotonic)

    @property
    def adapter(self) -> RowAdapter:
        return self.choice.adapter


@dataclass
class Piece:
    """What a step added to a completion; the last one has a `finish_reason`."""

    text: str = ""
    num_tokens: int = 0
    log_probs: list[TokenLogProb] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    routing: list[tuple[str, list[RouterChoice]]] = field(default_factory=list)
    """Texts of the tokens that were read meanwhile, which were told before, and what routers did
    with them; a last token is never read."""

    def add(self, later: Piece) -> None:
        self.text += later.text
        self.num_tokens += later.num_tokens
        self.log_probs += later.log_probs
        self.finish_reason = later.finish_reason
        self.routing += later.routing


# An error ends a request without a result.
Event = Piece | Exception
# Takes events, in the engine's thread; it must not block.
Sink = Callable[[Event], None]


class Row:
    """A request under way."""

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Sequence[int],
        sink: Sink,
        on_gone: Callable[[], object] = lambda: None,
    ):
        self.request = request
        self.sink = sink
        self.on_gone = on_gone
        self.owner = request.owner
        self.share = Share(request.tenant, request.owner)
        self.new_ids: list[int] = []
        self.first_token_s: float | None = None
        self.seconds = 0.0  # from its arrival to its end
        self.arrival = 0  # its place among all requests of the engine
        self.is_cancelled = False
        self.salt: Hashable = None  # what told the weights from others when its prompt was read
        self.restart()
        before = request.prompt_ids[-NUM_BEFORE:] if request.turn_end is None else ()
        stop = request.sampling.stop
        if request.turn_end and not request.ignore_end:
            stop = (*stop, request.turn_end)
        self._text = TextStream(tokenizer, stop, before)
        self._ends = frozenset() if request.ignore_end else frozenset(end_tokens)
        self._untold = Piece()
        self._last_text = ""
        self._num_routed = 0
        self.num_scored = 0  # of the prompt's tokens

    def restart(self) -> None:
        """Let the row be read from its beginning."""
        self.session: Decoding | None = None  # while its prompt is read
        self.num_read = 0
        self.num_known = 0  # of the tokens that were read, those that needed no computation
        # How long it must be before it gives way to others, so that it was worth the reading.
        self.settled_length = 0

    @property
    def length(self) -> int:
        return len(self.request.prompt_ids) + len(self.new_ids)

    @property
    def num_left(self) -> int:
        return self.length - self.num_read

    @property
    def tokens(self) -> list[int]:
        return [*self.request.prompt_ids, *self.new_ids]

    @property
    def is_to_be_scored(self) -> bool:
        num_targets = len(self.request.prompt_ids) - 1
        return self.request.scores_prompt and self.num_scored < num_targets

    @property
    def adapter_title(self) -> str | None:
        """The adapter's name as who asks has given it; None is the base model."""
        return None if self.request.adapter is None else self.owner

    def token_rule(self, vocab_size: int) -> TokenRule:
        request = self.request
        sampling = request.sampling
        addends = defaultdict(float, request.logit_bias)
        presence = request.presence_penalty
        frequency = request.frequency_penalty
        if presence or frequency:
            for token, count in Counter(self.new_ids).items():
                addends[token] -= presence + frequency * count
        read = set(self.tokens) if sampling.repetition_penalty != 1 else set()
        edits = {}
        for token in {*addends, *read}:
            penalty = sampling.repetition_penalty if token in read else 1.0
            edits[token] = (addends.get(token, 0.0), penalty)
        allowed = request.constraint and request.constraint.allowed(vocab_size)
        draw = (mix64(sampling.seed, 0, request.place, len(self.new_ids)) >> 40) / 2**24
        return TokenRule(sampling, draw, edits, allowed)  # ty: ignore[invalid-argument-type]

    def take(self, chosen: TokenLogProb) -> FinishReason | None:
        request = self.request
        piece = self._untold
        token = chosen.token
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()
        self.new_ids.append(token)
        piece.num_tokens += 1
        if request.num_logprobs is not None:
            piece.log_probs.append(chosen._replace(top=chosen.top[: request.num_logprobs]))
        piece.text = self._last_text = "" if token in self._ends else self._text.push(token)
        reason: FinishReason | None = None
        is_complete = request.constraint is not None and request.constraint.accept(token)
        if token in self._ends or self._text.stopped or is_complete:
            reason = "stop"
        elif len(self.new_ids) >= request.sampling.max_new_tokens:
            reason = "length"
        if reason is not None:
            piece.text += self._text.finish()
            reason = piece.finish_reason = "stop" if self._text.stopped else reason
        if piece.text or reason:
            self._untold = Piece()
            self.sink(piece)
        return reason

    def end_after_prompt(self) -> FinishReason:
        piece = self._untold
        piece.finish_reason = "length"
        self.sink(piece)
        return "length"

    def was_read(self, choices: list[RouterChoice]) -> None:
        """Note what routers did when they read the token that was chosen last, the first time."""
        if self._num_routed < len(self.new_ids):
            self._num_routed = len(self.new_ids)
            self._untold.routing.append((self._last_text, choices))

    def was_scored(self, log_probs: Tensor, top_log_probs: Tensor, top_ids: Tensor) -> None:
        """Note log-probabilities of the next tokens of the prompt, which it has not told yet."""
        for index, log_prob in enumerate(log_probs.tolist()):
            self.num_scored += 1
            token = self.request.prompt_ids[self.num_scored]
            top = list(zip(top_ids[index].tolist(), top_log_probs[index].tolist(), strict=True))
            self._untold.log_probs.append(TokenLogProb(token, log_prob, top))


def log_failure(event: str, error: Exception) -> None:
    """Keep the traceback of an error in the log, unless it is an answer, or tried again."""
    is_expected = isinstance(error, (LoraloomError, torch.OutOfMemoryError))
    _log.log(logging.INFO if is_expected else logging.ERROR, event, exc_info=error)
