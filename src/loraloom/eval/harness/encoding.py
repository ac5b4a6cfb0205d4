"""Text to token ids as lm-eval's own class for transformers models encodes it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from loraloom.data.tokenising import TokenPair, encode_texts, eos_token, leading_tokens
from loraloom.errors import ConfigError, DataError


class RequestEncoder:
    """Encodes what lm-eval asks.

    Args:
        tokenizer: The base model's.
        add_bos_token: Whether BOS stands in front of every text; None leaves it to the tokenizer.
            A text that begins with it, as chat templates make them, doesn't get it twice.
        prefix_token_id: Stands for an empty context; BOS by default, or EOS where there is none.

    Raises:
        ConfigError: If BOS is asked for and the tokenizer has none.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
    ):
        self.tokenizer = tokenizer
        self.prefix_token_id = _prefix(tokenizer) if prefix_token_id is None else prefix_token_id
        self._start = _start(tokenizer, add_bos_token)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, without EOS."""
        return encode_texts(self.tokenizer, texts, self._start)

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[TokenPair]:
        """Token ids of contexts and continuations.

        Whitespace at the end of a context goes to the continuation. What is scored are the tokens
        of the whole text after as many as the context has by itself, one at least.

        Raises:
            DataError: If a continuation is empty.

        Source:
            lm-eval 0.4.13 `lm_eval/api/model.py`, `TemplateLM._encode_pair` and `loglikelihood`.
        """
        _check_continuations(pairs)
        moved = [_move_trailing_space(context, continuation) for context, continuation in pairs]
        contexts = self._encode_distinct(context for context, _ in moved)
        wholes = iter(self.encode([context + rest for context, rest in moved if context]))
        bare = iter(
            encode_texts(self.tokenizer, [rest for context, rest in moved if not context], [])
        )
        return [
            self._cut(next(wholes), len(contexts[context])) if context else self._begin(next(bare))
            for context, _ in moved
        ]

    def _encode_distinct(self, texts: Iterable[str]) -> dict[str, list[int]]:
        distinct = list(dict.fromkeys(texts))
        return dict(zip(distinct, self.encode(distinct), strict=True))

    def _cut(self, whole: list[int], context_length: int) -> TokenPair:
        cut = min(context_length, len(whole) - 1)
        return TokenPair(whole[:cut], whole[cut:]) if cut else self._begin(whole)

    def _begin(self, ids: list[int]) -> TokenPair:
        """A continuation without context, which may begin with the prefix token itself."""
        if len(ids) > 1 and ids[0] == self.prefix_token_id:
            return TokenPair(ids[:1], ids[1:])
        return TokenPair([self.prefix_token_id], ids)


def _prefix(tokenizer: PreTrainedTokenizerBase) -> int:
    bos = tokenizer.bos_token_id
    return bos if isinstance(bos, int) else eos_token(tokenizer)


def _start(tokenizer: PreTrainedTokenizerBase, add_bos_token: bool | None) -> list[int]:
    if add_bos_token is None:
        return leading_tokens(tokenizer)
    if not add_bos_token:
        return []
    if not isinstance(tokenizer.bos_token_id, int):
        raise ConfigError("add_bos_token needs a tokenizer with a BOS token, got one without")
    return [tokenizer.bos_token_id]


def _check_continuations(pairs: Sequence[tuple[str, str]]) -> None:
    for context, continuation in pairs:
        if not continuation:
            raise DataError(
                f"a continuation must not be empty, got an empty one after {context[-60:]!r}"
            )


def _move_trailing_space(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
