"""The scripts of benchmarks/ keep up with what they import."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NO_SCRIPTS = {"cases", "kernels", "memory_prediction"}
"""What scripts import; `kernels` needs Triton."""
SCRIPTS = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - NO_SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_can_be_imported(name):
    assert callable(import_module(f"benchmarks.{name}").main)
