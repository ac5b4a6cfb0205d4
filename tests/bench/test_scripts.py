"""The scripts of benchmarks/ keep up with what they import."""

from __future__ import annotations

from argparse import Namespace
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


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.parametrize("case", ["peft-lora", "mixlora"])
def test_checkpointing_on_a_gpu_is_everybodys(monkeypatch, case):
    from transformers.models.llama.modeling_llama import LlamaAttention

    gpu = import_module("benchmarks.gpu")
    sizes = {"rows": 2, "length": 8, "layers": 2, "hidden_size": 128, "ffn_size": 64}
    calls, forward = [], LlamaAttention.forward
    monkeypatch.setattr(
        LlamaAttention,
        "forward",
        lambda *args, **options: calls.append(0) or forward(*args, **options),
    )
    counts = []
    for checkpointing in (False, True):
        options = Namespace(**sizes, device="cpu", checkpointing=checkpointing)
        step = gpu.make_step(case, options)
        calls.clear()
        step()
        counts.append(len(calls))
    assert counts == [2, 4]
