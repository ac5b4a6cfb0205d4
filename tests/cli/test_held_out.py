import json

import pytest

from loraloom.cli import eval as verb
from loraloom.cli import main as cli
from loraloom.config.data import PromptForm, SourceConfig
from loraloom.errors import DataError
from tests.generation.saved import write_rows

ROWS = [
    {"instruction": f"Say {word}", "input": "", "output": word}
    for word in ("blue", "yes", "two", "short", "one")
]


@pytest.fixture
def run(saved, tmp_path):
    """Run `loraloom eval --dataset` on the tiny model, with an adapter, and read what it wrote."""
    rows = write_rows(tmp_path / "held_out.jsonl", *ROWS)

    def verb(*words, dataset=rows, form="instruction", code=0):
        given = ["--base-model", str(saved / "base"), "--device", "cpu"]
        given += ["--dataset", dataset, "--format", form]
        given += ["--adapter", f"a={saved / 'lora'}", "--output", str(tmp_path / "r.json")]
        assert cli.main(["eval", *given, *words]) == code
        path = tmp_path / "r.json"
        return json.loads(path.read_text()) if path.exists() else None

    return verb


def test_base_and_adapters_have_a_loss_which_is_computed_once(run, capsys):
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
    again = run()
    assert again["results"] == written["results"]
    assert again["num_cached_scores"] == 2 * len(ROWS)
    assert "reused 10 cached scores of an earlier evaluation" in capsys.readouterr().err


def test_settings_of_data_may_be_given_as_in_a_run_file(run, tmp_path, capsys):
    turns = [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]
    path = write_rows(tmp_path / "chats.jsonl", *[{"said": turns}] * 3)
    source = {"dataset": path, "format": "chat", "fields": {"messages": "said"}}
    run("--dataset", json.dumps(source), code=2)
    assert "the tokenizer must have a chat template for messages" in capsys.readouterr().err
    source["chat_template"] = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert run("--dataset", json.dumps(source))["tasks"]["chats"]["num_examples"] == 3


def test_rows_have_the_adapters_template_where_formats_agree(tmp_path):
    plain = {"format": "instruction", "template": "plain"}
    chat, pairs = ({"format": one, "chat_template": "x"} for one in ("chat", "preference"))
    rows = {"dataset": write_rows(tmp_path / "rows.jsonl", *ROWS)}
    options = {"base_model": "m", "dataset": [*rows.values()]}
    for own, read in ((plain, plain), (plain, {"format": "text"}), (chat, pairs)):
        run = verb.EvalRun(**options, format=read["format"])
        sources = verb._held_out_sources(run, [PromptForm(**own)] * 2)
        assert sources == [SourceConfig(**rows, **read)]


def test_a_format_that_nothing_names_is_inferred_from_the_columns(tmp_path, capsys):
    rows = [{"Question": word, "reply": word} for word in ("blue", "yes")]
    path = write_rows(tmp_path / "rows.jsonl", *rows)
    fields = {"instruction": "Question", "output": "reply"}
    read = SourceConfig(dataset=path, format="instruction", template="plain", fields=fields)
    texts = (path, json.dumps({"dataset": path, "fields": {"output": "reply"}}))
    for text in texts:
        run = verb.EvalRun(base_model="m", dataset=(text,))
        assert verb._held_out_sources(run, []) == [read], text
    note = f"note: reading {path} as instruction plain; --format overrides"
    assert capsys.readouterr().err.splitlines() == [note] * 2
    run = verb.EvalRun(base_model="m", dataset=(write_rows(tmp_path / "odd.jsonl", {"a": 1}),))
    with pytest.raises(DataError, match="no format fits the columns 'a'"):
        verb._held_out_sources(run, [])


def test_options_of_rows_are_those_of_settings_without_them(run, tmp_path):
    rows = [{"instruction": "Say", "reply": "blue"}] * 2 + [{"instruction": 1}]
    write_rows(tmp_path / "own.jsonl", *rows)
    with (tmp_path / "own.jsonl").open("a") as file:
        file.write("{\n")
    source = {"dataset": str(tmp_path / "own.jsonl"), "fields": {"output": "reply"}}
    written = run("--dataset", json.dumps(source), "--limit", "2")
    assert written["tasks"]["own"]["num_examples"] == 2
    assert written["tasks"]["own"]["format"] == "instruction"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("--dataset {datset:a.jsonl}", "unknown key"),
        ("--harness arc_easy", "--dataset and --harness exclude each other"),
    ],
)
def test_bad_input_is_one_error_before_the_model_is_loaded(run, refused, words, message):
    assert message in refused(run, words, code=2)


def test_preference_pairs_are_evaluated(run, tmp_path, capsys):
    pairs = [{"prompt": "Say ", "chosen": word, "rejected": "no"} for word in ("blue", "yes", "")]
    file = write_rows(tmp_path / "pairs.jsonl", *pairs)
    run(dataset=file, form="preference", code=2)
    assert "line 3: field 'chosen' is empty" in capsys.readouterr().err
    source = {"dataset": file, "on_empty": "skip", "format": "preference"}
    written = run("--no-base", dataset=json.dumps(source), form="preference")
    shown = capsys.readouterr()
    assert "accuracy %" in shown.out
    assert "pairs: 2 pairs" in shown.err
    assert "1 skipped because of empty answers" in shown.err
    assert list(written["results"]) == ["a"]
