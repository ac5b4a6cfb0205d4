from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loraloom.cli import main as cli
from loraloom.errors import TrainingError


def run_with(monkeypatch, command):
    monkeypatch.setitem(cli.VERBS, "verb", (command, "A verb."))
    return cli.main(["verb"])


OLD = Path(__file__).parents[1] / "compatibility" / "v0"
NO_MODEL = {"transformers.modeling_utils", "torchao", "scipy", "torch._dynamo", "datasets"}
NO_TRANSFORMERS = {*NO_MODEL, "transformers", "torch.distributed.tensor", "sympy"}
NO_TORCH = {*NO_TRANSFORMERS, "torch", "pandas"}
UNNEEDED = {
    "--help": {*NO_TORCH, "numpy", "matplotlib"},
    "report RUNS --output page.html": NO_TORCH,
    "config show RUN.yaml": NO_TRANSFORMERS,
    "inspect RUNS/lora": NO_TRANSFORMERS,
    "convert RUNS/lora peft --to peft": NO_TRANSFORMERS,
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
    assert "give one that its files lack, PATH=VALUE: top_k=2" in text


@pytest.mark.parametrize("argv", [["--help"], ["config", "--help"], ["inspect", "--help"]])
def test_help_is_no_fault(argv, capsys):
    assert cli.main(argv) == 0
    assert "Usage" in capsys.readouterr().out


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("loraloom ")


def test_an_error_is_one_message_and_code_2(monkeypatch, capsys):
    def diverge() -> None:
        raise TrainingError("job a, step 3: the loss must be finite, got nan")

    assert run_with(monkeypatch, diverge) == 2
    assert capsys.readouterr().err == "error: job a, step 3: the loss must be finite, got nan\n"


def test_a_librarys_exit_with_a_text_is_a_fault(monkeypatch, capsys):
    def leave() -> None:
        raise SystemExit("no such kernel")

    assert run_with(monkeypatch, leave) == 1
    assert capsys.readouterr().err == "error: no such kernel\n"


def test_an_interrupt_is_code_130(monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert run_with(monkeypatch, interrupt) == 130


def test_an_unexpected_error_is_code_1_and_has_its_traceback(monkeypatch, capsys):
    def fail() -> None:
        raise RuntimeError("odd \x1b[31m" + 2000 * "x")

    assert run_with(monkeypatch, fail) == 1
    *traceback, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: unexpected RuntimeError: 'odd \\x1b[31m")
    assert len(line) < 200
    assert any(text.endswith("in fail") for text in traceback)


def test_a_fault_of_the_system_is_one_line_and_code_2(monkeypatch, capsys):
    def fail() -> None:
        raise OSError(28, "No space left on device")

    assert run_with(monkeypatch, fail) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"


def test_output_that_nobody_reads_ends_quietly():
    """As in `loraloom ... | head -1`."""
    code = "import sys; from loraloom.cli.main import main; sys.exit(main(['--help']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in (0, 1)


@pytest.mark.parametrize("argv", [["no-such-verb"], ["config", "show"], ["--no-such-option"], []])
def test_wrong_usage_is_code_2(argv):
    assert cli.main(argv) == 2


def test_the_nearest_verb_is_offered(capsys):
    assert cli.main(["inspec"]) == 2
    assert "inspect" in capsys.readouterr().err
