"""What lm-eval's requests say, in our terms: texts as token ids, and how tokens are chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedTokenizerBase

from loraloom.data.tokenising import (
    TokenPair,
    encode_texts,
    leading_tokens,
    move_trailing_space,
    start_of_text,
)
from loraloom.errors import ConfigError, DataError
from loraloom.infer.sampling import SamplingConfig, parse_sampling

_DRAWING = ("temperature", "top_k", "top_p")
_ALWAYS = ("repetition_penalty", "num_beams")


class RequestEncoder:
    """Encodes texts as lm-eval's own class for transformers models does."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
    ):
        self.tokenizer = tokenizer
        if prefix_token_id is None:
            prefix_token_id = start_of_text(tokenizer)
        self.prefix_token_id = prefix_token_id
        self._start = _start(tokenizer, add_bos_token)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts, without EOS."""
        return encode_texts(self.tokenizer, texts, self._start)

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[TokenPair]:
        """Token ids of contexts and continuations.

        Whitespace at the end of a context goes to the continuation. What is scored are the tokens
        of the whole text after as many as the context has by itself, one at least.

        Source:
            lm-eval 0.4.13 `lm_eval/api/model.py`, `TemplateLM._encode_pair` and `loglikelihood`.
        """
        for context, continuation in pairs:
            if not continuation:
                raise DataError(
                    f"a continuation must not be empty, got an empty one after {context[-60:]!r}"
                )
        moved = [move_trailing_space(context, continuation) for context, continuation in pairs]
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


def _start(tokenizer: PreTrainedTokenizerBase, add_bos_token: bool | None) -> list[int]:
    if add_bos_token is None:
        return leading_tokens(tokenizer)
    if not add_bos_token:
        return []
    if not isinstance(tokenizer.bos_token_id, int):
        raise ConfigError("add_bos_token needs a tokenizer with a BOS token, got one without")
    return [tokenizer.bos_token_id]


def parse_generation(settings: Mapping[str, Any], max_new_tokens: int) -> SamplingConfig:
    """Read a task's `generation_kwargs`."""
    normal: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), max_new_tokens))
    stop = tuple(dict.fromkeys(text for text in normal.pop("until") if text))
    length, do_sample = normal.pop("max_gen_toks"), normal.pop("do_sample")
    unknown = [name for name in normal if name not in (*_DRAWING, *_ALWAYS)]
    if unknown:
        known = ", ".join(("until", "max_gen_toks", "do_sample", *_DRAWING, *_ALWAYS))
        raise ConfigError(f"generation_kwargs may hold {known}, got {', '.join(unknown)}")
    if do_sample and float(normal.setdefault("temperature", 1.0)) == 0:
        raise ConfigError(
            "generation_kwargs: do_sample draws at a temperature above 0, got 0; "
            "leave do_sample out or raise the temperature"
        )
    names = (*_ALWAYS, *(_DRAWING if do_sample else ()))
    chosen = {name: normal[name] for name in names if normal.get(name) is not None}
    return parse_sampling(max_new_tokens=length, stop=stop, **chosen)
