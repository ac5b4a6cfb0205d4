"""Tokens as lines of a terminal, with marks under some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len, chop_cells
from transformers import PreTrainedTokenizerBase

from loraloom.data.tokenising import text_of_token
from loraloom.errors import plain


def token_lines(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], marked: Sequence[bool], width: int
) -> Iterator[str]:
    """Lines of tokens, `|` between them; after each that has marked ones, a line of `^`."""
    text, marks = "", ""
    for token, is_marked in zip(ids, marked, strict=True):
        shown = token_text(tokenizer, token)
        for part in chop_cells(shown, width - 1) or [""]:
            if cell_len(text) + cell_len(part) + 1 > width:
                yield from _lines(text, marks)
                text, marks = "", ""
            text += f"{part}|"
            marks += ("^" if is_marked else " ") * cell_len(part) + " "
        if "\\n" in shown:
            yield from _lines(text, marks)
            text, marks = "", ""
    yield from _lines(text, marks)


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """What stands for a token in a text, with escapes in place of what can't be seen."""
    return plain(text_of_token(tokenizer, token).replace("\n", "\\n"))


def _lines(text: str, marks: str) -> Iterator[str]:
    if text:
        yield text
    if marks.strip():
        yield marks.rstrip()
