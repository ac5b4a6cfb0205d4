"""Control tokens in texts from outside, which are read as plain text.

A chat template marks turns with tokens such as <|im_end|>. The same characters in a message must
not end its turn. A character that is no text, a mark, breaks them up before the template is
rendered, and the mark's tokens are taken out of what the tokenizer makes of it.
"""

import json
import re
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraloom.errors import DataError

_MARKS = range(0xE000, 0xF900)  # characters for private use
_REFUSAL = "messages must not contain control tokens of this tokenizer; remove those tokens"
_SHAPE = re.compile(r"<[|\uff5c].+[|\uff5c]>")  # of those that some tokenizers don't call special


def mark_control_tokens(tokenizer: PreTrainedTokenizerBase, value: Any) -> tuple[Any, str]:
    """Break up the control tokens in the texts of plain data, and return the mark: "" for none."""
    try:
        written = json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise DataError("messages and tools must not be nested deeply; simplify them") from None
    begins = _control_tokens(tokenizer)
    if not begins.search(written):
        return value, ""
    mark = next((mark for mark in map(chr, _MARKS) if mark not in written), "")
    if not mark:
        raise DataError(_REFUSAL)
    return json.loads(begins.sub(lambda begin: f"{begin[0]}{mark}", written)), mark


def drop_marks(tokenizer: PreTrainedTokenizerBase, ids: list[int], mark: str) -> list[int]:
    """Token ids without those of the mark."""
    letter = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer(f"a{mark}a", add_special_tokens=False)["input_ids"]
    mark_ids = framed[len(letter) : -1]
    kept: list[int] = []
    for token in ids:
        kept.append(token)
        if mark_ids and kept[-len(mark_ids) :] == mark_ids:
            del kept[-len(mark_ids) :]
    # else it has become part of other tokens, or is what all unknown characters are
    is_dropped = mark not in str(tokenizer.decode(kept)) and len(kept) < len(ids)
    if not is_dropped or tokenizer.unk_token_id in mark_ids:
        raise DataError(_REFUSAL)
    return kept


@lru_cache(maxsize=4)
def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches the first character of each."""
    added = tokenizer.added_tokens_decoder.values()
    texts = {str(token) for token in added if token.special or _SHAPE.fullmatch(str(token))}
    texts = {json.dumps(text, ensure_ascii=False)[1:-1] for text in texts if len(text) > 1}
    # of thousands that are numbered, one
    patterns = {re.sub(r"\d+", r"\\d+", re.escape(text)) for text in texts if text[0] != "\\"}
    return re.compile(f".(?<=(?=(?:{'|'.join(sorted(patterns))})).)" if patterns else "(?!)")
