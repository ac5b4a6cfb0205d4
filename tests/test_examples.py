"""The scripts and notebooks in examples/ run as they stand."""

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

from tests.generation.saved import save_tiny

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_custom_loop_learns_what_it_says(capsys):
    runpy.run_path(str(EXAMPLES / "custom_loop.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "asked for b: 1 2 3 4" in printed
    before, after = (float(share) for share in printed.split("7s from ")[1].split()[0:3:2])
    assert before < 0.2
    assert after > 0.5
    assert "goes on after step 15" in printed


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
def test_trainers_of_others_learn(capsys):
    runpy.run_path(str(EXAMPLES / "trainers.py"), run_name="__main__")
    losses = re.findall(r"(\w+): loss ([\d.]+), then ([\d.]+)", capsys.readouterr().out)
    assert [name for name, *_ in losses] == ["Trainer", "SFTTrainer", "DPOTrainer"]
    assert all(float(last) < float(first) / 2 for _, first, last in losses)


@pytest.mark.parametrize("name", ["train_and_look", "serve_and_compare"])
def test_notebooks_run_and_show_results(name, tmp_path, monkeypatch):
    rows = (EXAMPLES / "support.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "support.jsonl").write_text("".join(rows[:100]))
    monkeypatch.chdir(save_tiny(tmp_path, max_position_embeddings=1024))
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text())["cells"]
    assert len(cells) <= 12
    shown, names = [], {}
    for cell in cells:
        assert not cell.get("outputs"), "clear the outputs"
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("smollm2-135m", "base")
            *body, last = ast.parse(source.replace('"max_steps": 20', '"max_steps": 4')).body
            is_value = isinstance(last, ast.Expr)
            exec(compile(ast.Module(body if is_value else [*body, last], []), name, "exec"), names)
            if is_value:
                value = eval(compile(ast.Expression(last.value), name, "eval"), names)
                shown.append(getattr(value, "_repr_html_", value.__repr__)())
    assert any("<Axes:" in text for text in shown)
    assert any("<table" in text and "Differences on the same rows" in text for text in shown)
