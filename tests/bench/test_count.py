"""Counts of a layer against products done by hand, and what the command prints."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.cases import StepSetting
from benchmarks.count import (
    BASE_FORWARD,
    SHAPES,
    Shape,
    count_step,
)

SHAPE = Shape(hidden_size=64, ffn_size=160, num_heads=4, num_kv_heads=4, num_layers=3)
SETTING = StepSetting(rows=2, length=16, rank=4, num_experts=4)
TOKENS = 2 * 16


def flops_of_products(rank: int) -> int:
    """Forward, and backward to the inputs, of the base's linears and attention; LoRA on all.

    The first layer's input has no gradient, but the base's products to it are computed alike in
    every layer but the first, and a count extends the later ones.
    """
    linears = [(64, 64)] * 4 + [(64, 160)] * 2 + [(160, 64)]
    base = sum(2 * 2 * TOKENS * i * o for i, o in linears)
    lora = sum(3 * 2 * TOKENS * rank * (i + o) for i, o in linears)
    attention = 2 * 2 * 2 * 16 * 16 * 64 * 3  # scores and values; their backward is twice as much
    return base + lora + attention


def test_products_of_a_lora_are_those_counted_by_hand():
    two, three = (
        count_step("lora", Shape(64, 160, 4, 4, layers), SETTING, lora_rank=8) for layers in (2, 3)
    )
    assert three.flops - two.flops == pytest.approx(flops_of_products(8), rel=0.05)


def test_the_base_models_forward_is_what_is_left_without_an_adapter_and_a_backward():
    two, three = (
        count_step(BASE_FORWARD, Shape(64, 160, 4, 4, layers), SETTING, lora_rank=8)
        for layers in (2, 3)
    )
    linears = [(64, 64)] * 4 + [(64, 160)] * 2 + [(160, 64)]
    attention = 2 * 2 * 2 * 16 * 16 * 64
    products = sum(2 * TOKENS * i * o for i, o in linears) + attention
    assert three.flops - two.flops == products
    assert three.peak_bytes == two.peak_bytes
    assert three.operations < count_step("lora", SHAPE, SETTING, lora_rank=8).operations / 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("kernels", "of_lora", "of_mixture", "operations", "of_decomposed"),
    [("on", 0.9, 1.1, 1.25, 2.4), ("off", 1.0, 1.35, 1.5, 2.2)],
)
def test_mixtures_move_little_more_than_a_lora_of_their_size(
    monkeypatch, kernels, of_lora, of_mixture, operations, of_decomposed
):
    monkeypatch.setenv("LORALOOM_KERNELS", kernels)
    shape = replace(SHAPES["7b"], num_layers=3)
    setting = StepSetting(rows=8, length=512, rank=16)
    peft, lora, mixture, decomposed = (
        count_step(case, shape, setting, lora_rank=80)
        for case in ("peft-bf16", "lora", "mixlora", "mixdora")
    )
    assert lora.bytes / peft.bytes < of_lora
    assert mixture.bytes / lora.bytes < of_mixture
    assert mixture.operations / lora.operations < operations
    assert decomposed.bytes / lora.bytes < of_decomposed


def test_more_layers_cost_in_proportion():
    counts = [
        count_step("lora", Shape(64, 160, 4, 4, layers), SETTING, lora_rank=8)
        for layers in (2, 3, 10)
    ]
    per_layer = counts[1].bytes - counts[0].bytes
    assert counts[2].bytes == pytest.approx(counts[0].bytes + 8 * per_layer)
    assert counts[2].peak_bytes > counts[1].peak_bytes > counts[0].peak_bytes > 0
