"""Where kernels compute, and what they leave to PyTorch."""

import pytest
import torch
from torch import Tensor
from transformers.activations import SiLUActivation

from loraloom.ops.fused.expert_ffn import SWITCH, has_kernels, is_fused
from loraloom.ops.gating import ActivationGating
from tests.ops.ffn_case import compute_form, make_case


def rows(dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Tensor:
    return torch.empty(2, 3, dtype=dtype, device=device)


def test_half_precision_on_an_accelerator_is_fused_where_kernels_are_on(monkeypatch):
    for value in ("off", ""):
        monkeypatch.setenv(SWITCH, value)
        assert not is_fused(rows())
    monkeypatch.setenv(SWITCH, "on")
    assert is_fused(rows())
    assert is_fused(rows(torch.float16))
    assert not is_fused(rows(torch.float32))
    assert not is_fused(rows(device="cpu"))


@pytest.mark.parametrize("options", [{"decomposed": True}, {"rounds_rows": True}])
def test_blocks_whose_slots_stay_apart_are_left_to_pytorch(options):
    plain, apart = compute_form(make_case("gated")), compute_form(make_case("gated", **options))
    for act in (torch.nn.SiLU(), torch.nn.functional.silu, SiLUActivation()):
        assert has_kernels(plain, ActivationGating(act))
        assert not has_kernels(apart, ActivationGating(act))
    assert not has_kernels(plain, torch.tanh)
