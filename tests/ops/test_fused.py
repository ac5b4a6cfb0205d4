"""Functions that are compiled on accelerators, compiled on the CPU here."""

import json
import subprocess
import sys

import pytest
import torch

from loraloom.ops import fused


def test_a_block_is_compiled_once_for_any_number_of_tokens():
    # The graphs that Inductor gets; kernels of its own would take a minute.
    command = [sys.executable, "-m", "tests.ops.compiled_blocks", "aot_eager_decomp_partition"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "is not compiled" not in done.stderr
    result = json.loads(done.stdout)
    assert result["error"] < 1e-5
    # forward and backward
    assert result["graphs"] == 2


def test_what_cannot_be_compiled_is_computed_and_said_once(monkeypatch):
    @fused.fused_on_accelerators
    def breaking(values):
        torch._dynamo.graph_break()
        return values + 1

    monkeypatch.setattr(fused, "COMPILED_FOR", ("cpu",))
    with pytest.warns(UserWarning, match="breaking is not compiled"):
        assert breaking(torch.ones(1)) == 2
    assert breaking(torch.ones(1)) == 2
