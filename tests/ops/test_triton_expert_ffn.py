"""The Triton twin of the FFN block: its kernels in Triton's interpreter, and when it is chosen.

`interpreted_kernels.py` has the claims; here they run in a process of their own, since Triton asks
TRITON_INTERPRET when it is imported. `compiled_kernels.py` likewise.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN

from loraloom.ops import lean_expert_ffn as choice
from loraloom.ops import triton_expert_ffn as module
from loraloom.ops.triton_expert_ffn import activation_name, fits_triton, tiles
from tests.ops.ffn_case import compute_form, dense_loop, make_case, run

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def run_apart(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    root = Path(__file__).parents[2]
    variables = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=variables)


@needs_triton
def test_interpreted_kernels_compute_the_specification():
    done = run_apart("interpreted_kernels.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_gpus():
    done = run_apart("compiled_kernels.py", TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout


def test_triton_is_imported_only_where_it_runs():
    program = (
        "import sys, loraloom.ops.lean_expert_ffn; "
        "sys.exit('loraloom.ops.expert_ffn_kernels' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (functional.silu, "silu"),
        (functional.gelu, "gelu"),
        (functional.relu, "relu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (ACT2FN["silu"], "silu"),
        (ACT2FN["swish"], "silu"),
        (ACT2FN["gelu"], "gelu"),
        (ACT2FN["gelu_new"], "gelu_tanh"),
        (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
        (ACT2FN["relu"], "relu"),
        (ACT2FN["quick_gelu"], None),
        (ACT2FN["relu2"], None),
        (torch.tanh, None),
    ],
    ids=lambda value: getattr(value, "__name__", repr(value)),
)
def test_activations_are_known_by_their_type(act, name):
    assert activation_name(act) == name


class FakeGate(SimpleNamespace):
    """What the choice looks at of a tensor on a GPU."""

    is_cuda = True
    dtype = torch.bfloat16
    device = torch.device("cuda", 0)
    length = 8

    def __len__(self) -> int:
        return self.length


@pytest.mark.parametrize(
    ("differences", "rank", "act", "triton", "fits"),
    [
        ({}, 2, functional.silu, True, True),
        ({"dtype": torch.float32}, 64, functional.relu, True, True),
        ({"is_cuda": False}, 2, functional.silu, True, False),
        ({"dtype": torch.float64}, 2, functional.silu, True, False),
        ({}, 65, functional.silu, True, False),
        ({}, 2, torch.tanh, True, False),
        ({}, 2, functional.silu, False, False),
        ({"length": 0}, 2, functional.silu, True, False),
    ],
)
def test_it_fits_where_its_kernels_can_run(differences, rank, act, triton, fits, monkeypatch):
    monkeypatch.setattr(module, "_has_triton", lambda device: triton)
    weights = compute_form(make_case("gated", num_experts=4, rank=rank))
    check = getattr(fits_triton, "__wrapped__", fits_triton)  # without the tests' type checks
    assert check(FakeGate(**differences), weights, act) is fits


@pytest.mark.parametrize(
    ("spec", "variable", "capability", "has"),
    [
        (object(), "1", (8, 0), True),
        (object(), "1", (7, 5), False),
        (object(), "0", (9, 0), False),
        (None, "1", (9, 0), False),
    ],
)
def test_triton_needs_a_gpu_that_it_can_compile_for(spec, variable, capability, has, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: spec)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("LORALOOM_TRITON", variable)
    module._has_triton.cache_clear()
    assert module._has_triton(torch.device("cuda", 0)) is has
    module._has_triton.cache_clear()


@pytest.mark.parametrize("fits", [True, False])
def test_it_is_chosen_where_it_fits(fits, monkeypatch):
    case, taken = make_case("gated"), []
    monkeypatch.setattr(choice, "fits_triton", lambda *_: fits)
    lean = choice.lean_expert_ffn
    for name in ("triton", "lean"):
        note = lambda *a, n=name: taken.append(n) or lean(*a)  # noqa: E731
        monkeypatch.setattr(choice, f"{name}_expert_ffn", note)

    def chosen(x, gate, up, weights, routing, act, masks):
        return choice.adapter_ffn(x, gate, up, weights, routing, act, masks)

    torch.testing.assert_close(run(chosen, case), dense_loop(case))
    assert taken == ["triton" if fits else "lean"]


@pytest.mark.parametrize("size", [8, 16, 80, 128, 129, 256])
def test_tiles_are_powers_of_two(size):
    chosen = tiles(size)
    for tile in (chosen.forward, chosen.token, chosen.feature):
        for side in (tile.tokens, tile.features, tile.ranks):
            assert side >= 16
            assert side & (side - 1) == 0
