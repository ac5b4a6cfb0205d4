from __future__ import annotations

from rich.cells import cell_len

from loraloom.cli.data import token_lines


def show(tokenizer, text, marked, width=80):
    ids = tokenizer(text)["input_ids"]
    return list(token_lines(tokenizer, ids, [place in marked for place in range(len(ids))], width))


def test_marks_stand_under_the_marked_tokens(tiny_tokenizer):
    lines = show(tiny_tokenizer, "the sky\nblue", {4, 5, 6})
    assert lines == ["t|he| s|k|y|\\n|", "          ^ ^^", "bl|u|e|", "^^"]


def test_no_line_is_wider_than_the_width(tiny_tokenizer):
    text = "色は? the sky is blue, no? " * 20
    lines = show(tiny_tokenizer, text, set(range(0, 900, 2)), 40)
    assert max(map(cell_len, lines)) <= 40
    assert len(lines) > 20


def test_what_can_not_be_seen_is_escaped(tiny_tokenizer):
    assert "".join(show(tiny_tokenizer, "a\x1b[31m\tb", {})) == "a|\\x1b|[|3|1|m|\\t|b|"


def test_a_space_that_the_tokenizer_drops_is_shown(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(type(tiny_tokenizer), "convert_ids_to_tokens", lambda self, token: "▁sky")
    monkeypatch.setattr(type(tiny_tokenizer), "decode", lambda self, tokens: "sky")
    assert [*token_lines(tiny_tokenizer, [7], [False], 80)] == [" sky|"]
