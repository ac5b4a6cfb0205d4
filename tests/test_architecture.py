"""The way from the verb to the formula is short, and docs/architecture.md draws it as it is."""

import re
import traceback
from pathlib import Path

from loraloom.adapters import mixlora
from loraloom.cli import main as cli
from tests.training.saved import run_settings, save_inputs, write_run_file

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "loraloom"


def path_to_the_formula(tmp_path, monkeypatch) -> list[tuple[str, str]]:
    """File and function of each frame of ours between `loraloom train` and a mixture's FFN."""
    stacks: list[list[tuple[str, str]]] = []
    formula = mixlora.lean_expert_ffn

    def spy(*args):
        frames = [
            (str(Path(frame.filename).relative_to(SOURCE)), frame.name)
            for frame in traceback.extract_stack()
            if Path(frame.filename).is_relative_to(SOURCE) and not frame.name.startswith("<")
        ]
        stacks.append([*frames, ("ops/lean_expert_ffn.py", "lean_expert_ffn")])
        return formula(*args)

    monkeypatch.setattr(mixlora, "lean_expert_ffn", spy)
    run_file = write_run_file(
        tmp_path / "run.yaml", run_settings(save_inputs(tmp_path), tmp_path / "out")
    )
    cli.main(["train", str(run_file)])
    stack = next(stack for stack in stacks if any("fused.py" in file for file, _ in stack))
    return stack[stack.index(("cli/train.py", "train")) :]


def test_the_verb_is_sixteen_calls_and_nine_files_from_the_formula(tmp_path, monkeypatch):
    path = path_to_the_formula(tmp_path, monkeypatch)
    assert len(path) <= 16, path
    assert len({file for file, _ in path}) <= 9, path
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    drawn = re.findall(r"^\d+\. `([\w/]+\.py)` `([\w.]+)`", text, re.MULTILINE)
    assert [(file, name.rpartition(".")[2]) for file, name in drawn] == path
