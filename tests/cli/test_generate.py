import pytest

from loraloom.cli import generate as verb
from loraloom.cli.main import main
from loraloom.generation.generate import Completion
from loraloom.host.choice import Choice
from tests.generation.saved import read_rows, write_rows


@pytest.fixture
def run(saved):
    given = ["--base-model", str(saved / "base"), "--device", "cpu", "--max-new-tokens", "6"]
    return lambda *words: main(["generate", *given, *words])


def test_a_prompt_is_completed_on_the_terminal(run, monkeypatch, capsys):
    assert run("--prompt", "the sky", "--stop", "[]", "--stop={}") == 0  # no JSON
    completion = capsys.readouterr().out
    assert len(completion) > 1
    assert completion.endswith("\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(
        verb, "complete", lambda *_, **__: [Completion([], [], "\x1b[2J\t\n", Choice(None))]
    )
    assert run("--prompt", "the sky") == 0
    assert capsys.readouterr().out == "\\x1b[2J\t\n\n"


def test_a_file_is_completed_row_by_row(run, saved, tmp_path):
    rows = [{"prompt": "the sky", "id": 7}, {"prompt": "one"}, {"prompt": "one", "adapter": "base"}]
    rows[1] |= {"messages": None, "adapter": None}  # as a table has it
    path = write_rows(tmp_path / "in.jsonl", *rows)
    output = tmp_path / "out" / "completions.jsonl"
    assert run("--input", path, "--output", str(output), *["--adapter", f"a={saved / 'lora'}"]) == 0
    written = read_rows(output)
    assert [row["adapter"] for row in written] == ["a", "a", "base"]
    assert [row["prompt"] for row in written] == ["the sky", "one", "one"]
    assert written[0]["id"] == 7
    assert written[1]["completion"] != written[2]["completion"]


def test_a_row_without_an_adapter_is_answered_by_all_of_them(run, saved, tmp_path):
    path, output = write_rows(tmp_path / "in.jsonl", {"prompt": "one"}), tmp_path / "out.jsonl"
    adapters = [f"--adapter=a={saved / 'lora'}", f"--adapter=b={saved / 'mixlora'}"]
    assert run("--input", path, "--output", str(output), *adapters) == 0
    written = [(row["prompt"], row["adapter"]) for row in read_rows(output)]
    assert written == [("one", "a"), ("one", "b")]


def test_a_row_may_scale_its_adapter(run, saved, tmp_path):
    named = [["a", 0.0], "base", "a:0.5+b:-0.5", ["a", 1], "a+b:0"]
    path = write_rows(tmp_path / "in.jsonl", *({"prompt": "one", "adapter": a} for a in named))
    output = tmp_path / "out.jsonl"
    adapters = [f"--adapter={name}={saved / 'lora'}" for name in "ab"]
    assert run("--input", path, "--output", str(output), *adapters) == 0
    rows = read_rows(output)
    assert [row["adapter"] for row in rows] == named
    nothing, base, cancelled, whole, plus_none = (row["completion"] for row in rows)
    assert nothing == base == cancelled != whole == plus_none


def test_a_sum_answers_beside_its_adapters(run, saved, capsys):
    adapter = ["--prompt", "one", "--no-base", f"--adapter=a={saved / 'lora'}"]
    assert run(*adapter, "--adapter", "a:1") == 0
    own, of_sum = capsys.readouterr().out.split("[a:1]\n")
    assert own == f"[a]\n{of_sum}"
    assert run(*adapter, "--adapter", "a+law") == 2
    assert "adapter 'law' of 'a+law' is not loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 1: a row must have either 'prompt' or 'messages'"),
        ({"prompt": 3}, "line 1: field 'prompt' must be a string"),
        ({"prompt": "x", "tools": 3}, "field 'tools' must be"),
        ({"prompt": "x", "adapter": "c"}, "must be one of base, a, b, or [name, scale], got 'c'"),
        ({"prompt": "x", "adapter": ["a"]}, "field 'adapter' must be one of base, a, b, or [name"),
        ({"prompt": "x", "adapter": ["a", 10**400]}, "or [name, scale], got ['a', 1"),
        ({"prompt": "x", "adapter": ["a", "b"]}, "or [name, scale], got ['a', 'b']"),
        ({"messages": [{"role": "user"}]}, "no field 'content'"),
    ],
)
def test_a_bad_row_is_named(run, saved, tmp_path, capsys, row, message):
    adapters = [f"--adapter=a={saved / 'lora'}", f"--adapter=b={saved / 'mixlora'}"]
    assert run("--input", write_rows(tmp_path / "in.jsonl", row), *adapters) == 2
    error = capsys.readouterr().err
    assert "in.jsonl, line 1" in error
    assert message in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "either --prompt or --input"),
        ("--prompt x --input y", "either --prompt or --input"),
        ("--input nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("--prompt x --adapter a=nowhere", "or a Hub ID, got 'nowhere'"),
        ("--prompt x --top-p 0.5", "top_p requires temperature above 0"),
        ("--prompt x --temperature -1 --max-new-tokens 0", "max_new_tokens must be greater than"),
        ("--prompt x --output .", "--output must be a file"),
        ("--prompt x --raw --chat-template hermes", "--chat-template exclude each other"),
        ("--prompt x --resume", "--resume requires --output FILE.jsonl"),
        ("--prompt x --no-base", "--no-base requires --adapter NAME=PATH"),
        ("--input a.jsonl --no-base", "--no-base requires --prompt: of --input, the base model"),
    ],
)
def test_bad_input_is_one_error_before_the_model_is_loaded(run, refused, words, message):
    assert message in refused(run, words)


def interrupt_after(monkeypatch, num_batches):
    """Let the batch after some others end as by Ctrl-C; gives a counter of batches."""
    complete, count = verb.complete, []

    def counted(*args, **options):
        if len(count) == num_batches:
            raise KeyboardInterrupt
        count.append(1)
        return complete(*args, **options)

    monkeypatch.setattr(verb, "complete", counted)
    return count


MANY = [{"prompt": f"the sky is {'so ' * number}"} for number in range(7)]


@pytest.fixture
def job(run, tmp_path):
    """Complete seven rows in batches of two, with draws."""
    path = write_rows(tmp_path / "in.jsonl", *MANY)
    output = tmp_path / "out.jsonl"
    words = ["--batch-size", "2", "--raw", "--temperature", "1.5", "--input", path]
    return output, lambda *more: run(*words, "--output", str(output), *more)


def test_an_interrupted_file_has_the_rows_that_are_done_and_goes_on(job, monkeypatch, capsys):
    output, generate = job
    assert generate() == 0
    whole = output.read_text()
    output.unlink()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        assert generate() == 130
    assert output.read_text() == "".join(whole.splitlines(keepends=True)[:4])
    assert generate() == 2
    assert "pass --resume to continue, or delete the file" in capsys.readouterr().err
    count = interrupt_after(monkeypatch, 99)
    assert generate("--resume") == 0
    assert len(count) == 2
    assert output.read_text() == whole
    assert generate("--resume") == 0
    assert len(count) == 2
    torn = output.read_bytes()
    output.write_bytes(torn[: len(torn) // 2])
    assert generate("--resume") == 0
    assert output.read_text() == whole


@pytest.mark.parametrize("rows", [[*MANY[:2], {"prompt": "another"}, *MANY[3:]], MANY[:3]])
def test_other_rows_are_not_continued(job, tmp_path, capsys, rows):
    output, generate = job
    assert generate() == 0
    before = output.read_text()
    write_rows(tmp_path / "in.jsonl", *rows)
    assert generate("--resume") == 2
    assert "contains rows of another command; choose another file" in capsys.readouterr().err
    assert output.read_text() == before


def test_the_input_is_never_overwritten(run, tmp_path):
    path = write_rows(tmp_path / "in.jsonl", {"prompt": "one"})
    (tmp_path / "in.jsonl").write_text('{"prompt": "one"}')  # no line of it is whole
    for more in ([], ["--resume"]):
        assert run("--input", path, "--output", path, *more) == 2
    assert read_rows(tmp_path / "in.jsonl") == [{"prompt": "one"}]


def test_a_prompt_that_does_not_fit_leaves_nothing(run, tmp_path, capsys):
    path = write_rows(tmp_path / "in.jsonl", {"prompt": "the sky " * 300})
    assert run("--input", path, "--output", str(tmp_path / "out.jsonl")) == 2
    assert "the prompt must have at most" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["in.jsonl"]


def test_base_and_adapters_answer_a_prompt_alike(run, saved, capsys):
    assert run("--prompt", "the sky", "--adapter", f"a={saved / 'lora'}") == 0
    lines, names = capsys.readouterr().out.splitlines(), ["[base]", "[a]"]
    assert [line for line in lines if line in names] == names
    assert run("--prompt", "the sky", "--adapter", f"a={saved / 'lora'}", "--no-base") == 0
    assert "[" not in capsys.readouterr().out.replace("[/INST]", "")[:4]
