import re
from itertools import pairwise

import pytest
import yaml
from rich.cells import cell_len

from loraloom.cli.data import token_lines
from loraloom.cli.main import main
from tests.conftest import build_tokenizer
from tests.generation.saved import write_rows
from tests.tiny import tiny_model

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TURNS = [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    tiny_model(vocab_size=300).save_pretrained(directory / "base")
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory / "base")
    chats = [{"messages": TURNS}, {"messages": [TURNS[0], {**TURNS[1], "content": "x" * 99}]}]
    write_rows(directory / "chat.jsonl", *chats)
    (directory / "text.jsonl").write_text('{"text": "the sky"}\n')
    return directory


@pytest.fixture
def show(directory, tmp_path, monkeypatch, capsys):
    """Run `data show` on two jobs, and return what it prints."""
    monkeypatch.chdir(directory)
    run = {
        "base_model": "base",
        "output_dir": str(tmp_path / "out"),
        "jobs": [
            {
                "name": name,
                "adapter": {"method": "lora"},
                "data": {"dataset": f"{data_format}.jsonl", "format": data_format},
                "train": {"max_length": 64, "num_epochs": 1},
            }
            for name, data_format in {"chats": "chat", "texts": "text"}.items()
        ],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))

    def call(*words, code=0):
        assert main(["data", "show", str(tmp_path / "run.yaml"), *words]) == code
        shown = capsys.readouterr()
        return shown.err if code else shown.out

    return call


def marked(lines):
    """The characters that have a ^ under them."""
    return "".join(
        character
        for line, below in pairwise(lines)
        if set(below) <= {" ", "^"}
        for character, mark in zip(line, below, strict=False)
        if mark == "^"
    )


def test_rows_are_shown_with_marks_under_what_is_learnt(show):
    legend, _, chat, *lines = show("--rows", "1").splitlines()
    texts = lines.index("")
    assert legend == "Tokens are separated by |; ^ marks tokens in the loss."
    assert re.fullmatch(r"chats: chat.jsonl, row 1: \d+ tokens, 5 in the loss", chat)
    assert "".join(lines[:2]).replace("|", "").startswith("user:sky?<eos>\\nassistant:")
    assert marked(lines[:texts]) == "blue<eos>\\n"
    assert re.fullmatch(r"texts: text.jsonl, row 1: \d+ tokens, \d+ in the loss", lines[texts + 1])
    assert marked(lines[texts:]) == "he sky<eos>"  # the first token is predicted from nothing


def test_a_row_that_is_dropped_is_shown_as_such(show):
    assert "chats: chat.jsonl, row 2: dropped, because the answer exceeds max_length" in show()


def test_all_rows_of_a_run_file_are_checked_and_counted(directory, tmp_path, capsys):
    rows = [{"instruction": f"Say {n}", "output": "" if n in (5, 7) else "blue"} for n in range(9)]
    rows += [{"instruction": "Say 1", "output": "blue"}, {"instruction": 1, "output": "blue"}]
    name = f"{'rows_of_a_long_name' * 5}.jsonl"
    data = {"dataset": write_rows(tmp_path / name, *rows), "format": "instruction"}
    job = {"name": "a", "adapter": {"method": "lora"}, "train": {"max_steps": 1}, "data": data}
    run = {"base_model": str(directory / "base"), "output_dir": "out", "jobs": [job]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    assert main(["data", "show", str(tmp_path / "run.yaml"), "--rows", "1"]) == 2
    shown = capsys.readouterr()
    assert re.search(rf"a: {name} +11 +2 +0 +0 +1 +0 +1 *\n", shown.out)
    assert "3 of 11 rows can't be used:\n  2 rows, lines 6, 8: field 'output' is empty" in shown.err
    assert "\n  line 11: field 'instruction' must be a string, got 1" in shown.err
    assert main(["data", "show", str(tmp_path / "run.yaml"), "--set", "jobs.0.data.on_empty=skip"])
    assert f"{name}, line 11: field 'instruction' must be" in capsys.readouterr().err


def lines_of(tokenizer, text, marked, width=80):
    ids = tokenizer(text)["input_ids"]
    return list(token_lines(tokenizer, ids, [place in marked for place in range(len(ids))], width))


def test_marks_stand_under_the_marked_tokens(tiny_tokenizer):
    lines = lines_of(tiny_tokenizer, "the sky\nblue", {4, 5, 6})
    assert lines == ["t|he| s|k|y|\\n|", "          ^ ^^", "bl|u|e|", "^^"]


def test_no_line_is_wider_than_the_width(tiny_tokenizer):
    lines = lines_of(tiny_tokenizer, "色は? the sky is blue, no? " * 20, set(range(0, 900, 2)), 40)
    assert max(map(cell_len, lines)) <= 40
    assert len(lines) > 20


def test_what_can_not_be_seen_is_escaped(tiny_tokenizer):
    assert "".join(lines_of(tiny_tokenizer, "a\x1b[31m\tb", {})) == "a|\\x1b|[|3|1|m|\\t|b|"


def test_a_space_that_the_tokenizer_drops_is_shown(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(type(tiny_tokenizer), "convert_ids_to_tokens", lambda self, token: "▁sky")
    monkeypatch.setattr(type(tiny_tokenizer), "decode", lambda self, tokens: "sky")
    assert [*token_lines(tiny_tokenizer, [7], [False], 80)] == [" sky|"]
