"""How the next token is chosen, what ends a completion, and its text as it comes.

Axes: B rows, V vocabulary.

A row's random numbers come from the seed, the row's own key and the place of the token, so what is
drawn for a prompt does not depend on the prompts beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from loraloom.config.fields import StrictModel
from loraloom.errors import ConfigError
from loraloom.host.host import Host
from loraloom.ops.token_loss import is_broken
from loraloom.routing.tally import widened

MIN_TEMPERATURE = 0.001
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Tokens that are decoded again until they make a text; no character has more bytes than half.
_MAX_HELD = 8


class SamplingConfig(StrictModel):
    """How tokens are chosen, and when to stop."""

    max_new_tokens: int = Field(default=128, ge=1)
    """Generate at most N tokens per prompt."""
    temperature: float = Field(default=0.0, ge=0)
    """Sample from softmax(logits / temperature); 0: always select the most likely token."""
    top_k: int = Field(default=0, ge=0)
    """Sample from the K most likely tokens; 0: no limit."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens whose probabilities sum to P."""
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100)
    """Divide logits of earlier tokens by this, and multiply negative ones; 1: off."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Set the random seed."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """End completions before this string. Repeatable."""

    @override
    def contradictions(self) -> Iterator[str]:
        for name, value, plain in (("top_k", self.top_k, 0), ("top_p", self.top_p, 1)):
            if self.temperature == 0 and value != plain:
                yield (
                    f"{name} requires temperature above 0, got {name} {value} with temperature 0"
                )


class TokenRule(NamedTuple):
    """How a row's next token is chosen."""

    sampling: SamplingConfig
    draw: float  # uniform in [0, 1)
    edits: Mapping[int, tuple[float, float]]  # by token, what its logit gets, and then a penalty
    allowed: Tensor | None  # whether each token may follow, [V] on the CPU; None: all

    def num_candidates(self, vocab_size: int) -> int:
        """Return how many of the most likely tokens must be ordered; 0 if draws are of all."""
        if self.sampling.top_k:
            return min(self.sampling.top_k, vocab_size)
        return vocab_size if self.sampling.top_p < 1 else 0


class TokenLogProb(NamedTuple):
    """A token, its log-probability, and those of the most likely tokens in its place."""

    token: int
    log_prob: float
    top: list[tuple[int, float]]


def choose_tokens(
    logits: Float[Tensor, "B V"], rules: Sequence[TokenRule], num_top: int | None = None
) -> list[TokenLogProb]:
    """Choose all rows' tokens and read them from the device at once; -1 if logits are broken.

    Without `num_top`, how many of the most likely tokens to tell, log-probabilities are 0.
    """
    edited = _edited(logits, rules)
    tokens = edited.argmax(-1)
    groups: dict[int, list[tuple[int, TokenRule]]] = {}
    for row, rule in enumerate(rules):
        if rule.sampling.temperature > 0:
            groups.setdefault(rule.num_candidates(logits.shape[1]), []).append((row, rule))
    for num_candidates, members in groups.items():
        index, drawn_tokens = _draw(edited, members, num_candidates)
        tokens = tokens.index_copy(0, index, drawn_tokens)
    tokens = tokens[:, None]  # (B, 1)
    columns = [tokens.masked_fill(is_broken(logits)[:, None], -1)]
    if num_top is not None:
        log_probs = logits.float().log_softmax(-1)
        top = log_probs.topk(min(num_top, logits.shape[1]))
        columns += [log_probs.gather(1, tokens), top.indices, top.values]
    table = torch.cat([widened(column) for column in columns], dim=1).tolist()
    chosen = []
    for token, *numbers in table:
        stop = 1 + len(numbers) // 2
        ids = [int(number) for number in numbers[1:stop]]
        top = list(zip(ids, numbers[stop:], strict=True))
        chosen.append(TokenLogProb(int(token), numbers[0] if numbers else 0.0, top))
    return chosen


def _edited(logits: Tensor, rules: Sequence[TokenRule]) -> Tensor:
    """Add biases, divide earlier tokens' logits by their penalty, and leave out what is barred."""
    indices = []
    edits = []
    for row, rule in enumerate(rules):
        indices += [row * logits.shape[1] + token for token in rule.edits]
        edits += rule.edits.values()
    if indices:
        index = torch.tensor(indices, device=logits.device)
        addends, penalties = torch.tensor(edits, device=logits.device).T
        flat = logits.float().flatten()
        values = flat.index_select(0, index) + addends
        values = torch.where(values < 0, values * penalties, values / penalties)
        logits = flat.index_copy(0, index, values).view_as(logits)
    if any(rule.allowed is not None for rule in rules):
        is_barred = torch.zeros(logits.shape, dtype=torch.bool)
        for barred, rule in zip(is_barred, rules, strict=True):
            if rule.allowed is not None:
                barred.copy_(~rule.allowed)
        logits = logits.masked_fill(is_barred.to(logits.device), -torch.inf)
    return logits


def _draw(
    logits: Tensor, members: Sequence[tuple[int, TokenRule]], num_candidates: int
) -> tuple[Tensor, Tensor]:
    """Draw tokens for some rows; return the rows and the tokens."""
    settings = []
    for row, rule in members:
        divisor = max(rule.sampling.temperature, MIN_TEMPERATURE)  # logits by less are infinite
        settings.append((row, divisor, rule.sampling.top_p, rule.draw))
    columns = torch.tensor(settings, device=logits.device).T.unsqueeze(2)
    rows, divisors, top_p, draws = columns  # (S, 1) each, of S drawn rows
    index = rows[:, 0].long()
    scores = logits.index_select(0, index).float() / divisors
    ids = None
    if num_candidates == logits.shape[1]:
        scores, ids = scores.sort(descending=True, stable=True)
    elif num_candidates:
        scores, ids = scores.topk(num_candidates)
    probs = widened(scores.softmax(-1))
    if ids is not None:
        likelier = probs.cumsum(-1) - probs
        probs = probs.masked_fill(likelier >= top_p.to(probs), 0)
    # The first token at which the sum of probabilities exceeds the draw, but for rounding.
    sums = probs.cumsum(-1)
    total = sums[:, -1:]
    place = ((sums <= draws.to(sums) * total) & (sums < total)).sum(-1, keepdim=True)
    place = place.to(index)
    return index, (place if ids is None else ids.gather(1, place))[:, 0]


@dataclass
class JsonConstraint:
    """The tokens that may follow in one completion, by a matcher of llguidance."""

    matcher: Any

    def copy(self) -> JsonConstraint:
        return JsonConstraint(self.matcher.deep_copy())

    def allowed(self, num_tokens: int) -> Tensor:
        """Whether each token may follow, [V] on the CPU."""
        biases = bytearray(self.matcher.compute_logit_bias())
        allowed = torch.frombuffer(biases, dtype=torch.uint8)[:num_tokens].bool()
        return torch.nn.functional.pad(allowed, (0, num_tokens - len(allowed)))

    def accept(self, token: int) -> bool:
        """Add a token, and say whether the text is complete."""
        if not self.matcher.consume_token(token):
            fault = self.matcher.get_error().partition("\n")[0]
            raise ConfigError(f"the JSON schema can't be kept: {fault}")
        return self.matcher.is_stopped()


def end_tokens(host: Host, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    configured = host.model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})


class TextStream:
    """A completion's text up to a stop text; no later token changes what `push` returns."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        before: Sequence[int] = (),
    ):
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        # special tokens, which the text leaves out, and those of them that are stop texts
        added = tokenizer.added_tokens_decoder
        self._special = {token for token in added if added[token].special}
        self._ends = {token for token in self._special if str(added[token]) in stop}
        self._pending = ""
        # Tokens that are decoded together, as spaces and characters of several bytes depend on
        # their neighbors. The first `_num_settled` are in the text already, as `_known_text`.
        self._window = [*before]
        self._num_settled = len(self._window)
        self._known_text = self._text_before() if before else ""

    def push(self, token: int) -> str:
        """Add a token, and return the text that is settled by it."""
        if token in self._ends:
            settled = self.finish()
            self.stopped = True
            return settled
        if token in self._special:
            return ""
        self._window.append(token)
        decoded = self._decode()
        is_open = decoded.endswith(_INCOMPLETE) or len(decoded) <= len(self._known_text)
        if not is_open:
            kept = self._window[self._num_settled :]
        elif len(self._window) - self._num_settled < _MAX_HELD:
            return ""
        else:
            # bytes that make no characters, of which the last may yet begin one
            decoded = decoded.removesuffix(_INCOMPLETE)
            kept = self._window[-_MAX_HELD // 2 :]
        fresh = decoded[len(self._known_text) :]
        self._window, self._num_settled = kept, len(kept)
        self._known_text = self._decode()
        if is_open:
            self._known_text = self._known_text.removesuffix(_INCOMPLETE)
        return self._settle(fresh, is_last=False)

    def finish(self) -> str:
        return self._settle(self._decode()[len(self._known_text) :], is_last=True)

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._window, skip_special_tokens=True))

    def _text_before(self) -> str:
        """The text in front, without the beginning of a character that is not whole yet."""
        text = self._decode()
        if not text.endswith(_INCOMPLETE):
            return text
        sign = self._tokenizer(_INCOMPLETE, add_special_tokens=False)["input_ids"]
        # the sign itself may be written there, as it is in texts that were decoded wrongly before
        is_whole = self._window[-len(sign) :] == sign
        return text if is_whole else text.rstrip(_INCOMPLETE)

    def _settle(self, fresh: str, *, is_last: bool) -> str:
        if self.stopped:
            return ""
        pending = self._pending + fresh
        cuts = [pending.index(stop) for stop in self._stop if stop in pending]
        self.stopped = bool(cuts)
        num_settled = len(pending)
        if cuts:
            num_settled = min(cuts)
        elif not is_last:
            num_settled -= self._num_begun(pending)
        self._pending = pending[num_settled:]
        return pending[:num_settled]

    def _num_begun(self, text: str) -> int:
        """Characters at a text's end that a stop text may begin with, kept until more is known."""
        longest = max(map(len, self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                return size
        return 0
