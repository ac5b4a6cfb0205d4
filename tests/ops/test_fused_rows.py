"""Where kernels compute, and what they leave to PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.activations import SiLUActivation

from loraloom.ops.fused.expert_ffn import SWITCH, by_slot, has_kernels, is_fused, over_slots
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


def test_slots_have_the_columns_of_their_expert_and_add_up():
    low_rank = torch.tensor([[1.0, 2.0, 3.0, 4.0]])  # one token, two experts of rank 2
    own = torch.tensor([[[0.0, 0.5]], [[2.0, 0.0]]])  # expert 1 with weight 0.5, then 0 with 2
    assert by_slot(low_rank, own, 2).tolist() == [[0, 0, 1.5, 2], [2, 4, 0, 0]]
    assert over_slots(torch.ones(2, 4), own, 2).tolist() == [[2, 2, 0.5, 0.5]]
