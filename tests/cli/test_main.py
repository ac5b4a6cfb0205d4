import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from loraloom.cli import main as cli
from loraloom.errors import TrainingError


def run_with(monkeypatch, error):
    def fail() -> None:
        raise error

    monkeypatch.setitem(cli.VERBS, "verb", (fail, "A verb."))
    return cli.main(["verb"])


OLD = Path(__file__).parents[1] / "compatibility" / "v0"
NO_MODEL = {"transformers.modeling_utils", "torchao", "scipy", "torch._dynamo", "datasets"}
NO_TRANSFORMERS = {*NO_MODEL, "transformers", "torch.distributed.tensor", "sympy"}
NO_TORCH = {*NO_TRANSFORMERS, "torch", "pandas"}
UNNEEDED = {
    "--help": {*NO_TORCH, "numpy", "matplotlib"},
    "report RUNS --output page.html": NO_TORCH - {"pandas"},  # which draws its curves
    "config show RUN.yaml": NO_TRANSFORMERS,
    "inspect RUNS/lora": NO_TRANSFORMERS,
    "data show RUN.yaml": NO_MODEL,
}
"""Command -> modules that it doesn't import, in an order in which each may import more."""


def test_commands_import_only_what_they_need(tmp_path):
    data = {"dataset": str(OLD / "rows.jsonl"), "format": "instruction"}
    job = {"name": "a", "adapter": {"method": "lora"}, "data": data, "train": {"max_steps": 1}}
    run = {"base_model": str(OLD / "base"), "output_dir": "out", "jobs": [job]}
    (tmp_path / "RUN.yaml").write_text(json.dumps(run))
    (tmp_path / "RUNS").symlink_to(OLD / "runs")
    code = (
        "import sys; from loraloom.cli.main import main\n"
        f"for line, unneeded in {UNNEEDED}.items():\n"
        "    code = main(line.split())\n"
        "    if found := unneeded & set(sys.modules): code = f'{line}: imports {found}'\n"
        "    if code: sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "Usage: loraloom" in result.stdout


def test_help_shows_defaults_that_say_something(capsys):
    assert cli.main(["chat", "--help"]) == cli.main(["convert", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert set(re.findall(r"\[default: (.*?)\]", text)) == {"auto", "512", "0.7", "0", "1.0"}
    assert "that the files lack or that you want to change, PATH=VALUE: top_k=2" in text


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_fits_a_screen_and_says_what_an_option_does(monkeypatch, capsys, verb):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.strip().splitlines()) <= 60
    titles = [text.find(name) for name in ("Data and", "Results", "Base model and adapters")]
    assert verb != "eval" or -1 < titles[0] < titles[1] < titles[2]
    assert not re.search(r"  (Of|In place of|Where to|Most) ", text)


@pytest.mark.parametrize(
    ("line", "code", "text"),
    [
        *(("--help", 0, "Usage"), ("config --help", 0, "Usage"), ("inspect --help", 0, "Usage")),
        *(("--version", 0, "loraloom "), ("inspec", 2, "inspect"), ("no-such-verb", 2, "")),
        *(("config show", 2, ""), ("--no-such-option", 2, ""), ("", 2, "")),
    ],
)
def test_help_is_no_fault_and_wrong_usage_is_code_2(capsys, line, code, text):
    assert cli.main(line.split()) == code
    printed = capsys.readouterr()
    assert text in (printed.err if code else printed.out)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (TrainingError("job a, step 3: the loss must be finite, got nan"), 2, "job a, step 3: the"),
        (OSError(28, "No space left on device"), 2, "[Errno 28] No space left on device\n"),
        (SystemExit("no such kernel"), 1, "no such kernel\n"),  # of a library
    ],
)
def test_an_error_is_one_message_and_a_code(monkeypatch, capsys, error, code, line):
    assert run_with(monkeypatch, error) == code
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line}")
    assert printed.count("\n") == 1


def test_an_interrupt_is_code_130(monkeypatch):
    assert run_with(monkeypatch, KeyboardInterrupt()) == 130


def test_an_unexpected_error_is_code_1_and_has_its_traceback(monkeypatch, capsys):
    assert run_with(monkeypatch, RuntimeError("odd \x1b[31m" + 2000 * "x")) == 1
    *traceback, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: unexpected RuntimeError: 'odd \\x1b[31m")
    assert len(line) < 200
    assert any(text.endswith("in fail") for text in traceback)


def test_output_that_nobody_reads_ends_quietly():
    """As in `loraloom ... | head -1`."""
    code = "import sys; from loraloom.cli.main import main; sys.exit(main(['--help']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1)


def test_a_warning_is_a_line_without_code(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    assert cli.main(["--version"]) == 0
    assert warnings.formatwarning("two\x1b", UserWarning, "file.py", 1) == "warning: two\\x1b\n"
