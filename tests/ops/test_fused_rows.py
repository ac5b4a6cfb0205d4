"""Where kernels compute, and what they leave to PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loraloom.ops.fused.rows import SWITCH, activation_name, by_slot, is_fused, over_slots


def rows(dtype: torch.dtype = torch.bfloat16, device: str = "meta") -> Tensor:
    return torch.empty(2, 3, dtype=dtype, device=device)


def test_half_precision_on_an_accelerator_is_fused(monkeypatch):
    monkeypatch.setenv(SWITCH, "on")
    assert is_fused(rows())
    assert is_fused(rows(torch.float16))
    assert not is_fused(rows(torch.float32))
    assert not is_fused(rows(device="cpu"))


def test_kernels_are_off_unless_they_are_turned_on(monkeypatch):
    for value in (None, "off", ""):
        monkeypatch.delenv(SWITCH, raising=False)
        if value is not None:
            monkeypatch.setenv(SWITCH, value)
        assert not is_fused(rows())


@pytest.mark.parametrize(("act", "name"), [(torch.nn.SiLU(), "silu"), (torch.tanh, None)])
def test_known_activations_have_a_name(act, name):
    assert activation_name(act) == name


def test_slots_have_the_columns_of_their_expert_and_add_up():
    low_rank = torch.tensor([[1.0, 2.0, 3.0, 4.0]])  # one token, two experts of rank 2
    own = torch.tensor([[[0.0, 0.5]], [[2.0, 0.0]]])  # expert 1 with weight 0.5, then 0 with 2
    spread = by_slot(low_rank, own, 2)
    assert spread.tolist() == [[0, 0, 1.5, 2], [2, 4, 0, 0]]
    assert over_slots(torch.ones(2, 4), own, 2).tolist() == [[2, 2, 0.5, 0.5]]
