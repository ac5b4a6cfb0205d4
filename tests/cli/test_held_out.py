from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraloom.cli import main as cli
from tests.generation.saved import save_tiny

ROWS = [
    {"instruction": f"Say {word}", "input": "", "output": word}
    for word in ("blue", "yes", "two", "short", "one")
]


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def run(saved, tmp_path):
    """Run `loraloom eval --dataset` on the tiny model, with an adapter, and read what it wrote."""
    rows = write(tmp_path / "held_out.jsonl", ROWS)

    def verb(*words, code=0):
        given = ["--base-model", str(saved / "base"), "--device", "cpu"]
        given += ["--dataset", rows, "--format", "instruction"]
        given += ["--adapter", f"a={saved / 'lora'}", "--output", str(tmp_path / "r.json")]
        assert cli.main(["eval", *given, *words]) == code
        path = tmp_path / "r.json"
        return json.loads(path.read_text()) if path.exists() else None

    return verb


def test_base_and_adapters_have_a_loss(run, capsys):
    written = run()
    assert list(written["results"]) == ["base", "a"]
    result = written["results"]["a"]["held_out"]
    assert result["num_examples"] == len(ROWS)
    assert written["tasks"]["held_out"]["format"] == "instruction"
    assert [(one["first"], one["metric"]) for one in written["comparisons"]] == [("a", "loss")]
    output = capsys.readouterr()
    assert "perplexity" in output.out
    assert f"{result['loss']:.4f}" in output.out
    assert "held_out: 5 rows, " in output.err


def test_a_repeated_evaluation_computes_nothing(run, capsys):
    first = run()
    capsys.readouterr()
    again = run()
    assert again["results"] == first["results"]
    assert again["num_cached_scores"] == 2 * len(ROWS)
    assert "10 scores are those of an earlier evaluation" in capsys.readouterr().err


def test_columns_may_have_other_names(run, tmp_path):
    rows = [{"q": row["instruction"], "a": row["output"]} for row in ROWS]
    other = ["--dataset", write(tmp_path / "other.jsonl", rows), "--template", "plain"]
    renamed = ["--field", "instruction=q", "--field", "output=a"]
    run(*other, *renamed, code=2)  # the first file has not these columns
    (tmp_path / "held_out.jsonl").write_text(Path(tmp_path / "other.jsonl").read_text())
    results = run(*other, *renamed)["results"]["a"]
    assert results["held_out"]["loss"] == results["other"]["loss"]


def test_conversations_are_written_out_by_the_template_that_is_given(run, tmp_path, capsys):
    turns = [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]
    write(tmp_path / "held_out.jsonl", [{"messages": turns}] * 3)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    run("--format", "chat", code=2)
    assert "the tokenizer must have a chat template for messages" in capsys.readouterr().err
    given = run("--format", "chat", "--chat-template", template)
    longer = run("--format", "chat", "--chat-template", template.replace("}}", "}}, yes"))
    tokens = [written["tasks"]["held_out"]["num_tokens"] for written in (given, longer)]
    assert 0 < tokens[0] < tokens[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--beta 0.2", "--beta has an effect with --format preference only"),
        ("--dataset nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("--chat-template trl", "chat_template has no effect on format instruction"),
        ("--field answer=a", "fields.answer.[key] must be 'instruction', 'input', "),
        ("--compare a:b", "--compare must be FIRST:SECOND, two of base, a, got 'a:b'"),
        ("--num-fewshot 1", "--num-fewshot has an effect with --harness only"),
        ("--harness arc_easy", "--dataset has no effect with --harness"),
    ],
)
def test_bad_input_is_one_error_before_the_model_is_loaded(
    run, monkeypatch, capsys, words, message
):
    from loraloom.generation import loading

    monkeypatch.setattr(loading, "load_base_model", lambda *_: pytest.fail("loaded"))
    run(*words.split(), code=2)
    assert message in capsys.readouterr().err


def test_preference_pairs_are_evaluated(saved, tmp_path, capsys):
    pairs = [{"prompt": "Say ", "chosen": word, "rejected": "no"} for word in ("blue", "yes", "")]
    given = ["eval", "--base-model", str(saved / "base"), "--device", "cpu", "--no-cache"]
    given += ["--dataset", write(tmp_path / "pairs.jsonl", pairs), "--format", "preference"]
    given += ["--adapter", f"a={saved / 'lora'}", "--output", str(tmp_path / "r.json")]
    assert cli.main(given) == 2
    assert "line 3: field 'chosen' is empty" in capsys.readouterr().err
    assert cli.main([*given, "--on-empty", "skip", "--beta", "0.2", "--no-base"]) == 0
    shown = capsys.readouterr()
    assert "reward margin" in shown.out
    assert "pairs: 2 pairs" in shown.err
    assert "1 skipped, their answer is empty" in shown.err
    written = json.loads((tmp_path / "r.json").read_text())
    assert list(written["results"]) == ["a"]
    assert written["tasks"]["pairs"]["beta"] == 0.2
