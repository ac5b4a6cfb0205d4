import json
import re
from unittest.mock import Mock

import pytest
import torch

from loraloom.cli.main import main
from loraloom.training.settings import load_run_config
from tests.cli.test_data import TEMPLATE
from tests.conftest import build_tokenizer
from tests.generation.saved import write_rows
from tests.tiny import tiny_model

TURNS = [{"role": "user", "content": "sky #?"}, {"role": "assistant", "content": "blue"}]
# A row, with # for its number, and settings of the job's data.
ROWS = [
    ({"Question": "sky #?", "answer": "blue", "id": 7}, {"template": "plain"}),
    ({"instruction": "sky #?", "output": "blue"}, {"template": "alpaca"}),
    ({"input": "sky #?", "output": "blue"}, {"template": "plain"}),
    ({"input": "sky?", "context": "# rains", "output": "gray"}, {"template": "plain"}),
    ({"prompt": "#", "messages": TURNS}, {"format": "chat"}),
    ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {"format": "chat", "fields": None}),
    ({"content": "the sky # is blue"}, {"fields": {"text": "content"}}),
    ({"prompt": "sky #?", "chosen": " blue", "rejected": " no"}, {"fields": None}),
]


@pytest.fixture
def init(saved, tmp_path, monkeypatch, capsys):
    """Run `loraloom init` in an empty directory, and return what it prints."""
    monkeypatch.chdir(tmp_path)

    def call(file, *words, code=0):
        assert main(["init", str(file), "--base-model", str(saved / "base"), *words]) == code
        printed = capsys.readouterr()
        return printed.err if code else printed.out

    return call


@pytest.mark.parametrize(("row", "settings"), ROWS, ids=" ".join)
def test_a_run_file_trains_as_it_was_written(init, tmp_path, row, settings):
    rows = [json.loads(json.dumps(row).replace("#", str(n))) for n in range(12)]
    words = ["--chat-template", TEMPLATE] if settings.get("format") == "chat" else []
    said = init(write_rows(tmp_path / "my rows.jsonl", *rows), *words)
    assert re.search(r"row 1.*: \d+ tokens, \d+ in the loss\n", said)
    assert "\n12 rows of " in said
    assert "  loraloom data show run.yaml\n  loraloom train run.yaml\n" in said
    data = load_run_config("run.yaml").jobs[0].data
    assert {key: getattr(data, key) for key in settings} == settings
    assert main(["train", "run.yaml", "--set", "jobs.0.train.num_epochs=1"]) == 0
    assert json.loads((tmp_path / "runs/my-rows/my-rows/result.json").read_text())["steps"] == 2
    assert "run.yaml exists. Pass --overwrite" in init("my rows.jsonl", code=2)
    init("my rows.jsonl", *words, "--overwrite")


def test_experts_that_compute_a_share_of_the_tokens_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained("base")
    tiny_model("qwen3_moe", torch.float32, vocab_size=len(tokenizer)).save_pretrained("base")
    write_rows(tmp_path / "rows.jsonl", *({"text": f"the sky {n} is blue"} for n in range(12)))
    words = ["init", "rows.jsonl", "--base-model", "base", "--expert-share"]
    assert main([*words, "2"]) == 2
    assert main([*words, "0.4"]) == 0
    assert re.search(r"experts: \d of 8 compute 40% of the tokens", capsys.readouterr().out)
    adapter = load_run_config("run.yaml").jobs[0].adapter
    assert adapter.base_experts.keys() == {0, 1}
    assert all(0 < len(experts) < 4 for experts in adapter.base_experts.values())
    assert main(["train", "run.yaml", "--set", "jobs.0.train.num_epochs=1"]) == 0


def test_the_run_file_is_written_before_rows_are_shown(init, tmp_path, monkeypatch):
    monkeypatch.setattr("loraloom.cli.init.row_lines", Mock(side_effect=OSError("full")))
    init(write_rows(tmp_path / "rows.jsonl", ROWS[1][0]), code=2)
    assert (tmp_path / "run.yaml").exists()


def test_columns_may_have_any_names_and_one_row_is_enough(init, tmp_path):
    (tmp_path / "übung.csv").write_text("Frage,Réponse\nFarbe?,'blau' 🌌\n", encoding="utf-8-sig")
    error = init("übung.csv", code=2)
    assert "no format fits the columns 'Frage', 'Réponse'" in error
    assert "\n  instruction: instruction, output, input\n" in error
    words = ["--column=instruction=Frage", "--column=output=Réponse", "--output=new/run.yaml"]
    assert "\n1 rows of " in init("übung.csv", *words)
    assert load_run_config("new/run.yaml").jobs[0].data.validation_fraction == 0
    assert main(["train", "new/run.yaml", "--set", "jobs.0.train.num_epochs=1"]) == 0
    assert "ROLE=COLUMN" in init("übung.csv", "--column", "output", code=2)
    error = init("übung.csv", words[0], "--column=output=reponse", code=2)
    assert "the row has no field 'reponse', the output of format instruction" in error


@pytest.mark.parametrize(("num_rows", "text"), [(2, "; 1 duplicate\n"), (3, "; 2 duplicates\n")])
def test_repeated_rows_are_counted(init, tmp_path, num_rows, text):
    assert text in init(write_rows(tmp_path / "rows.jsonl", *[ROWS[1][0]] * num_rows))


def test_all_faults_are_listed_and_no_run_file_is_written(init, tmp_path):
    rows = [{"prompt": "sky?", "reply": "" if n % 3 else "blue"} for n in range(300)]
    odd = [{"prompt": 5, "reply": "blue"}, {"text": "the sky"}]
    error = init(write_rows(tmp_path / "rows.jsonl", *rows, *odd), code=2)
    assert "202 of 302 rows can't be used:\n  200 rows, lines 2, 3, 5, 6" in error
    assert "and 180 more: field 'reply' is empty" in error
    assert "line 301: field 'prompt' must be a string, got 5" in error
    assert "line 302: the row has no field 'prompt'" in error
    assert not (tmp_path / "run.yaml").exists()
    init(write_rows(tmp_path / "rows.jsonl", *rows), "--on-empty", "skip")
    assert load_run_config("run.yaml").jobs[0].data.on_empty == "skip"


def test_faults_of_a_kind_are_listed_together_whatever_values_they_quote(init, tmp_path):
    faults = [{"prompt": 5}, {"prompt": 7.5}, {"prompt": [5]}, {"prompt": {"a": 1}}, {"reply": 1}]
    rows = [{"prompt": "sky?", "reply": "blue", **fault} for fault in faults]
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    with (tmp_path / "rows.jsonl").open("a") as opened:
        opened.write('{"a": 1,\n{"a"\n')
    text = "field 'prompt' must be a string, got"
    assert init(file, code=2).splitlines()[1:] == [
        f"  2 rows, lines 1, 2: {text} 5; use quotes (as in line 1)",
        f"  2 rows, lines 3, 4: {text} [5]; write a text (as in line 3)",
        "  line 5: field 'reply' must be a string, got 1; use quotes",
        "  2 rows, lines 6, 7: the row must be JSON: EOF while parsing a value at column 8 (as in "
        "line 6)",
    ]


def test_faults_of_messages_are_listed_together_wherever_they_are(init, tmp_path):
    turns = [*TURNS, {"role": "usr", "content": "sky?"}, {"role": "human", "content": "sky?"}]
    calls = [{"role": "assistant", "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": ""}]
    chats = [turns[:3], [*TURNS, *turns], [*TURNS, turns[3]], [TURNS[0], calls[0]], TURNS + calls]
    file = write_rows(tmp_path / "rows.jsonl", *({"messages": messages} for messages in chats))
    error = init(file, "--chat-template", TEMPLATE, code=2)
    assert "\n  3 rows, lines 1, 2, 3: message 3: role must be one of " in error
    assert "got 'usr'; did you mean 'user'? (as in line 1)\n" in error
    assert "\n  2 rows, lines 4, 5: the chat template drops the tool_calls of message 2;" in error


@pytest.fixture
def chatml(tmp_path, monkeypatch):
    """The directory of a base model with ChatML's tokens whose template drops tools."""
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained("chatml")
    tiny_model(vocab_size=len(tokenizer)).save_pretrained("chatml")
    return "chatml"


TOOLS = [{"name": "look"}]
WITH_TOOLS = {"messages": TURNS, "tools": TOOLS}
NOTE = "chat template: hermes, because the base model's drops tools\n"


def test_init_sets_hermes_if_the_base_models_template_drops_tools(chatml, tmp_path, capsys):
    call = {"role": "assistant", "tool_calls": [{"name": "look"}]}
    pair = {"prompt": TURNS[:1], "chosen": [call], "rejected": TURNS[1:], "tools": TOOLS}
    for name, row in {"chats": WITH_TOOLS, "pairs": pair}.items():
        file = write_rows(tmp_path / f"{name}.jsonl", *[{**row, "tools": None}] * 101, row)
        assert main(["init", file, "--base-model", chatml, "--output", name]) == 0
        assert NOTE in capsys.readouterr().out
        assert load_run_config(name).jobs[0].data.chat_template == "hermes"
    assert main(["data", "show", "chats"]) == 0
    faulty = {"messages": [TURNS[0], {**TURNS[1], "role": "usr"}]}  # whatever the template
    file = write_rows(tmp_path / "faulty.jsonl", WITH_TOOLS, faulty)
    assert main(["init", file, "--base-model", chatml]) == 2
    printed = capsys.readouterr()
    assert NOTE in printed.out
    assert "faulty.jsonl, line 2: message 2: role must be" in printed.err
    file = write_rows(tmp_path / "turns.jsonl", {"messages": TURNS})
    assert main(["init", file, "--base-model", chatml]) == 0
    assert NOTE not in capsys.readouterr().out
    assert load_run_config("run.yaml").jobs[0].data.chat_template is None


def test_init_names_hermes_only_where_it_writes_the_row(chatml, tmp_path, capsys):
    reasoning = {**WITH_TOOLS, "messages": [TURNS[0], {**TURNS[1], "reasoning_content": "hm"}]}
    file = write_rows(tmp_path / "rows.jsonl", WITH_TOOLS, reasoning)
    drops = "the chat template drops the tools; set"
    hermes = "chat_template: hermes (loraloom init: --chat-template hermes)"
    for words in ([], ["--chat-template", TEMPLATE]):
        assert main(["init", file, "--base-model", chatml, *words]) == 2
        printed = capsys.readouterr()
        assert NOTE not in printed.out
        assert f"\n  line 1: {drops} {hermes}\n  line 2: {drops} another chat_temp" in printed.err


def test_hermes_is_not_proposed_to_a_tokenizer_without_its_tokens(init, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", WITH_TOOLS)
    error = init(file, "--chat-template", TEMPLATE, code=2)
    assert "line 1: the chat template drops the tools; set another chat_template" in error


def test_choice_questions_need_a_task_file(init, tmp_path):
    row = {"question": "?", "choices": ["a", "b"], "answer": "a"}
    error = init(write_rows(tmp_path / "rows.jsonl", row), code=2)
    assert "rows.jsonl has choices. Name a task, or write a task file" in error
    assert not (tmp_path / "run.yaml").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", b"", "rows.jsonl contains no rows"),
        ("rows.jsonl", b"no\n{", "2 of 2 rows can't be used"),
        ("rows.csv", "prompt,answer\nä,b\n".encode("latin-1"), "in UTF-8"),
        ("rows.parquet", b"PAR1", "the file can't be read"),
        ("rows.jsonl/a", b"", "got the directory rows.jsonl"),
    ],
)
def test_a_file_that_can_not_be_used_is_one_message(init, tmp_path, name, content, message):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    assert message in init(name.partition("/")[0], code=2)


def test_a_huge_row_is_cut_at_the_greatest_length(init, tmp_path):
    rows = [{"text": "sky " * size} for size in (100_000, 10, 20)]
    said = init(write_rows(tmp_path / "rows.jsonl", *rows))
    assert "to 2048 tokens" in said
    assert "; 1 cut or divided to fit max_length=2048\n" in said
    text = (tmp_path / "run.yaml").read_text()
    assert "the longest row has at least 2048" in text
    assert int(re.search(r"eval_steps: (\d+)", text)[1]) > 3  # by its parts
    assert len(said.splitlines()) < 120
    assert load_run_config("run.yaml").jobs[0].train.max_length == 2048
