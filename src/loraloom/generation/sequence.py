"""What the engine is asked for, how far it has come, and what it tells on the way.

Axes: V vocabulary.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.data.tokenising import NUM_BEFORE
from loraloom.generation.sampling import SamplingConfig, TokenChooser
from loraloom.generation.scoring import TokenScores
from loraloom.generation.text import TextStream
from loraloom.models.decoding import Decoding
from loraloom.models.layout import RowAdapter, name_and_scale
from loraloom.routing.record import RouterChoice

FinishReason = Literal["stop", "length"]
"""An end token or a stop text came, or there is no room for more tokens."""


class Share(NamedTuple):
    """Whose turn a request uses up: the adapter's or base model's, of who asks."""

    tenant: str
    owner: str


@runtime_checkable
class Constraint(Protocol):
    """What tokens may follow one another, such as those of a JSON schema."""

    def allowed(self, num_tokens: int) -> Tensor:
        """Return which tokens may come next, [V] of booleans on the CPU."""
        ...

    def accept(self, token: int) -> bool:
        """Take a token; return whether the text is complete."""
        ...


@dataclass(frozen=True)
class GenerationRequest:
    """One completion to make.

    Args:
        prompt_ids: Tokens to continue, at least one.
        adapter: Its name on the host, perhaps with a scale; None is the base model.
        owner: Under which name it is counted: the model's public name.
        sampling: How tokens are chosen.
        place: Which of several completions of the prompt; draws follow from it and the seed, as
            they do from a prompt's place in `generate`.
        num_logprobs: Most likely tokens to tell with each token; None tells no log-probabilities.
        presence_penalty: Taken off the logits of tokens that were generated before.
        frequency_penalty: Taken off for each time that they were.
        logit_bias: Added to the logits of tokens.
        ignore_end: End tokens end nothing.
        constraint: What tokens may follow; it belongs to this request alone.
        tells_routing: Tell which experts read each token.
        continues: The text goes on where the prompt's ends, with the space between them.
        tenant: Who asks, such as an API key; others share neither its turn nor its prompts.
        arrived_s: When it came, by the monotonic clock.
    """

    prompt_ids: Sequence[int]
    adapter: RowAdapter
    owner: str
    sampling: SamplingConfig
    place: int = 0
    num_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    ignore_end: bool = False
    constraint: Constraint | None = None
    tells_routing: bool = False
    continues: bool = False
    tenant: str = ""
    arrived_s: float = field(default_factory=time.monotonic)

    @property
    def adapter_name(self) -> str | None:
        """The adapter's name on the host."""
        return name_and_scale(self.adapter)[0]

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is taken, whatever was said."""
        penalised = self.presence_penalty or self.frequency_penalty or self.logit_bias
        repetition = self.sampling.repetition_penalty != 1
        drawn = self.sampling.temperature > 0
        return not (penalised or repetition or drawn or self.constraint)


@dataclass(frozen=True)
class ScoreRequest:
    """Tokens whose log-probabilities are asked for; the first one has none.

    Args:
        tokens: At least one.
        adapter: As in `GenerationRequest`.
        owner: As there.
        num_top: Most likely tokens to tell with each.
        tenant: As there.
        arrived_s: As there.
    """

    tokens: Sequence[int]
    adapter: RowAdapter
    owner: str
    num_top: int = 0
    tenant: str = ""
    arrived_s: float = field(default_factory=time.monotonic)

    @property
    def adapter_name(self) -> str | None:
        """The adapter's name on the host."""
        return name_and_scale(self.adapter)[0]


class TokenLogProb(NamedTuple):
    """A token, its log-probability, and those of the most likely tokens in its place."""

    token: int
    log_prob: float
    top: list[tuple[int, float]]


class TokenRouting(NamedTuple):
    """A token of a completion, and what the adapter's routers did when they read it."""

    text: str
    choices: list[RouterChoice]


@dataclass
class Piece:
    """What a step added to a completion.

    Args:
        text: Text that is settled now.
        num_tokens: Tokens that were generated, the end token included.
        log_probs: Of these tokens, where they are asked for.
        finish_reason: Why it ended, in the last piece.
        routing: Of the tokens that were read meanwhile, where it is asked for. A token is read
            after it was told, so that these are older ones; the last one is never read.
    """

    text: str
    num_tokens: int
    log_probs: list[TokenLogProb] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    routing: list[TokenRouting] = field(default_factory=list)

    def add(self, later: Piece) -> None:
        """Take in what came after it."""
        self.text += later.text
        self.num_tokens += later.num_tokens
        self.log_probs += later.log_probs
        self.finish_reason = later.finish_reason
        self.routing += later.routing


@dataclass(frozen=True)
class Failure:
    """Why a request ends without a result."""

    error: Exception


Event = Piece | Failure
Sink = Callable[[Event], None]
"""Takes events, in the engine's thread; it must not block."""
OnGone = Callable[[], object]
"""Told once that the engine has let a request go, and uses its adapter no more."""


class Score:
    """A request for log-probabilities under way."""

    def __init__(self, request: ScoreRequest, sink: Sink, on_gone: OnGone):
        self.request = request
        self.sink = sink
        self.on_gone = on_gone
        self.share = Share(request.tenant, request.owner)
        self.is_cancelled = False

    def tell(self, scores: TokenScores) -> None:
        """Tell the log-probabilities that were computed."""
        columns = zip(
            self.request.tokens[1:],
            scores.log_probs.tolist(),
            scores.top_ids[:, : self.request.num_top].tolist(),
            scores.top_log_probs.tolist(),
            strict=True,
        )
        entries = [
            TokenLogProb(token, log_prob, list(zip(ids, values, strict=False)))
            for token, log_prob, ids, values in columns
        ]
        self.sink(Piece("", 0, entries, "length"))


class Row:
    """A request under way."""

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: Sequence[int],
        device: torch.device,
        sink: Sink,
        on_gone: OnGone = lambda: None,
    ):
        self.request = request
        self.sink = sink
        self.on_gone = on_gone
        self.share = Share(request.tenant, request.owner)
        self.new_ids: list[int] = []
        self.first_token_s: float | None = None
        self.seconds = 0.0
        """From its arrival to its end."""
        self.arrival = 0
        """Its place among all requests of the engine."""
        self.is_cancelled = False
        self.salt: Hashable = None
        """What told the adapter's weights from others when its prompt was read."""
        self.session: Decoding | None = None
        """While its prompt is read."""
        self.num_read = 0
        self.num_known = 0
        """Of the tokens that were read, those that needed no computation."""
        self.settled_length = 0
        """How long it must be before it gives way to others, so that it was worth the reading."""
        before = request.prompt_ids[-NUM_BEFORE:] if request.continues else ()
        self._text = TextStream(tokenizer, request.sampling.stop, before)
        self._ends = frozenset() if request.ignore_end else frozenset(end_tokens)
        self._chooser = TokenChooser(request.sampling, request.place, device)
        self._counts: Counter[int] = Counter()
        self._unsaid: list[TokenLogProb] = []
        self._num_unsaid = 0
        self._last_text = ""
        self._num_routed = 0
        self._untold_routing: list[TokenRouting] = []

    @property
    def owner(self) -> str:
        """Under which name it is counted."""
        return self.request.owner

    @property
    def length(self) -> int:
        """Tokens so far."""
        return len(self.request.prompt_ids) + len(self.new_ids)

    @property
    def tokens(self) -> list[int]:
        """All tokens so far."""
        return [*self.request.prompt_ids, *self.new_ids]

    def choose(self, logits: Tensor, most_likely: int) -> int:
        """Choose the next token."""
        if self.request.is_plain:
            return most_likely
        logits = self._penalised(logits.float())
        if self.request.constraint is not None:
            allowed = self.request.constraint.allowed(len(logits)).to(logits.device)
            logits = logits.masked_fill(~allowed, -torch.inf)
        return self._chooser.choose(self.tokens, logits)

    def take(self, token: int, logits: Tensor) -> FinishReason | None:
        """Add a token that was chosen, and tell what follows from it."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()
        self.new_ids.append(token)
        self._counts[token] += 1
        self._num_unsaid += 1
        if self.request.num_logprobs is not None:
            self._unsaid.append(log_prob_of(token, logits, self.request.num_logprobs))
        text = self._last_text = "" if token in self._ends else self._text.push(token)
        reason = self._finish_reason(token)
        if reason is not None:
            text += self._text.finish()
            reason = "stop" if self._text.stopped else reason
        if text or reason:
            self.sink(Piece(text, self._num_unsaid, self._unsaid, reason, self._untold_routing))
            self._unsaid, self._num_unsaid, self._untold_routing = [], 0, []
        return reason

    def was_read(self, choices: list[RouterChoice]) -> None:
        """Note what routers did when they read the token that was chosen last, the first time."""
        if self._num_routed == len(self.new_ids):
            return
        self._num_routed = len(self.new_ids)
        self._untold_routing.append(TokenRouting(self._last_text, choices))

    def _finish_reason(self, token: int) -> FinishReason | None:
        constraint = self.request.constraint
        is_complete = constraint is not None and constraint.accept(token)
        if token in self._ends or self._text.stopped or is_complete:
            return "stop"
        return "length" if len(self.new_ids) >= self.request.sampling.max_new_tokens else None

    def _penalised(self, logits: Tensor) -> Tensor:
        request = self.request
        if not (request.presence_penalty or request.frequency_penalty or request.logit_bias):
            return logits
        penalties = {
            token: -request.presence_penalty - request.frequency_penalty * count
            for token, count in self._counts.items()
        }
        for token, bias in request.logit_bias.items():
            penalties[token] = penalties.get(token, 0.0) + bias
        index = torch.tensor(list(penalties), dtype=torch.long, device=logits.device)
        added = logits.new_tensor(list(penalties.values()))
        return logits.index_add(0, index, added)


def log_prob_of(token: int, logits: Tensor, num_top: int) -> TokenLogProb:
    """Compute a token's log-probability from logits, [V], and those of the most likely tokens."""
    log_probs = logits.float().log_softmax(-1)
    values, ids = log_probs.topk(min(num_top, len(log_probs)))
    top = list(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogProb(token, float(log_probs[token]), top)
