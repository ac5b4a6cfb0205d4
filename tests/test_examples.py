"""The scripts in examples/ run as they stand."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

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
