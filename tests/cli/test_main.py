import subprocess
import sys

import pytest

from loraloom.cli import main as cli
from loraloom.errors import TrainingError


def run_with(monkeypatch, command):
    monkeypatch.setitem(cli.VERBS, "verb", command)
    return cli.main(["verb"])


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from loraloom.cli.main import main; code = main(['--help']);"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Usage: loraloom" in result.stdout


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


def test_an_interrupt_is_code_130(monkeypatch):
    def interrupt() -> None:
        raise KeyboardInterrupt

    assert run_with(monkeypatch, interrupt) == 130


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def fail() -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        run_with(monkeypatch, fail)


@pytest.mark.parametrize("argv", [["no-such-verb"], ["config", "show"], ["--no-such-option"], []])
def test_wrong_usage_is_code_2(argv):
    assert cli.main(argv) == 2


def test_the_nearest_verb_is_offered(capsys):
    assert cli.main(["inspec"]) == 2
    assert "inspect" in capsys.readouterr().err


def test_every_verb_has_a_line_of_help():
    commands = [
        *cli.VERBS.values(),
        *(c for _, group in cli.GROUPS.values() for c in group.values()),
    ]
    assert all(command.__doc__ for command in commands)
