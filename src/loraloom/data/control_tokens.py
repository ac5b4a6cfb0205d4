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
    unused = [chr(code) for code in _MARKS if chr(code) not in written]
    if not unused:
        raise DataError(_REFUSAL)
    mark = unused[0]
    marked = begins.sub(lambda begin: begin[0] + mark, written)
    return json.loads(marked), mark


def drop_marks(tokenizer: PreTrainedTokenizerBase, ids: list[int], mark: str) -> list[int]:
    letter, framed = tokenizer(["a", f"a{mark}a"], add_special_tokens=False)["input_ids"]
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
    patterns: set[str] = set()
    for token in tokenizer.added_tokens_decoder.values():
        text = str(token)
        written = json.dumps(text, ensure_ascii=False)[1:-1]
        is_control = token.special or _SHAPE.fullmatch(text)
        if is_control and len(text) > 1 and not written.startswith("\\"):
            # of thousands that are numbered, one
            patterns.add(re.sub(r"\d+", r"\\d+", re.escape(written)))
    any_token = "|".join(sorted(patterns)) or "(?!)"  # which matches nothing
    return re.compile(f".(?<=(?=(?:{any_token})).)")
