"""How the next token is chosen, what ends a completion, and its text as it comes.

Axes: V vocabulary.

A row's random numbers come from the seed and the row's own key, so what is drawn for a prompt does
not depend on the prompts beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import logits_process as hf
from typing_extensions import override

from loraloom.config.fields import StrictModel
from loraloom.errors import ConfigError
from loraloom.host.host import Host
from loraloom.ops.dropout import sample_key

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


class TokenChooser:
    """Chooses the tokens of one row, whose draws follow from the seed and the row's number."""

    def __init__(self, sampling: SamplingConfig, row: int, device: torch.device):
        self._processors = hf.LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if sampling.repetition_penalty != 1:
            penalty = hf.RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
            self._processors.append(penalty)
        if sampling.temperature == 0:
            return
        # logits by less are infinite
        temperature = max(sampling.temperature, MIN_TEMPERATURE)
        self._processors.append(hf.TemperatureLogitsWarper(temperature))
        if sampling.top_k > 0:
            self._processors.append(hf.TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._processors.append(hf.TopPLogitsWarper(sampling.top_p))
        # a generator of its own leaves torch's global numbers alone
        self._generator = torch.Generator(device).manual_seed(sample_key(sampling.seed, 0, row))

    @property
    def is_needed(self) -> bool:
        return bool(self._processors)

    def choose(self, input_ids: Sequence[int], logits: Tensor) -> int:
        """Choose the token after `input_ids` by its logits, [V]."""
        # The Gumbel-max trick: argmax(logits - log(e)), e ~ Exp(1), is a draw from softmax(logits).
        before = torch.tensor([input_ids], dtype=torch.long, device=logits.device)
        scores = self._processors(before, logits.float().unsqueeze(0))  # pyright: ignore[reportArgumentType]
        if self._generator is not None:
            draws = torch.empty_like(scores).exponential_(generator=self._generator)
            scores = scores - draws.clamp_min_(torch.finfo(draws.dtype).tiny).log_()
        return int(scores.argmax())


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
