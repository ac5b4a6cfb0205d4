"""Tests for a GPU, with kernels as they run there: `pytest tests/gpu`, apart from the others."""

import os
import sys

import pytest
import torch

_HAS_GPU = torch.cuda.is_available()
_IS_APART = "loraloom" not in sys.modules
if _HAS_GPU and _IS_APART:
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ["LORALOOM_KERNELS"] = "on"


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not _HAS_GPU:
        pytest.skip("there is no CUDA device")
    if not _IS_APART:
        pytest.skip("other tests have kernels interpreted on the CPU; run pytest tests/gpu")
