"""Text of tokens as they come, up to a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one completion.

    What `push` returns is settled: no later token changes it, and no stop text begins in it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        before: Sequence[int] = (),
    ):
        self.stopped = False
        """Whether a stop text came."""
        self._tokenizer = tokenizer
        self._stop = stop
        self._hidden = _with_special_tokens(tokenizer, stop)
        self._hidden_window = max((len(text.encode()) for text in self._hidden), default=0)
        self._ids, self._num_before = [*before], len(before)
        self._pending = ""
        # Tokens before `_known` are in the text. Some in front of them are decoded again with what
        # follows, as spaces and characters of several bytes depend on their neighbours.
        self._start = 0
        self._known = len(before)
        self._known_text = self._decode().rstrip(_INCOMPLETE) if before else ""

    def push(self, token: int) -> str:
        """Add a token, and return the text that is settled by it."""
        self._ids.append(token)
        if self._hidden and self._ends_hidden():
            settled, self.stopped = self.finish(), True
            return settled
        decoded = self._decode()
        if decoded.endswith(_INCOMPLETE) or len(decoded) <= len(self._known_text):
            return ""
        fresh = decoded[len(self._known_text) :]
        self._start, self._known = self._known, len(self._ids)
        self._known_text = self._decode()
        return self._settle(fresh, is_last=False)

    def finish(self) -> str:
        """Return what is left when no token follows."""
        return self._settle(self._decode()[len(self._known_text) :], is_last=True)

    def _decode(self) -> str:
        return str(self._tokenizer.decode(self._ids[self._start :], skip_special_tokens=True))

    def _ends_hidden(self) -> bool:
        """Whether a stop text came that has special tokens, which the text leaves out."""
        # a token has a byte at least
        own = self._ids[self._num_before :]
        tail = str(self._tokenizer.decode(own[-self._hidden_window :]))
        return any(text in tail for text in self._hidden)

    def _settle(self, fresh: str, *, is_last: bool) -> str:
        if self.stopped:
            return ""
        pending = self._pending + fresh
        cuts = [place for place in map(pending.find, self._stop) if place >= 0]
        if cuts:
            self.stopped = True
            settled, self._pending = pending[: min(cuts)], ""
        else:
            kept = 0 if is_last else self._begun(pending)
            settled, self._pending = pending[: len(pending) - kept], pending[len(pending) - kept :]
        return settled

    def _begun(self, text: str) -> int:
        """Count the characters at the text's end that a stop text may begin with."""
        longest = max(map(len, self._stop), default=1) - 1
        return next(
            (
                length
                for length in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-length:]) for stop in self._stop)
            ),
            0,
        )


def _with_special_tokens(tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> list[str]:
    """Choose the stop texts that have a special token in them, or are a part of one."""
    if not stop:
        return []
    special = [str(one) for one in tokenizer.added_tokens_decoder.values() if one.special]
    return [text for text in stop if any(text in one or one in text for one in special)]
