"""The Triton twin on a GPU, against the specification at Llama-2-7B's shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from loraloom.ops.expert_ffn import FfnDropout, FfnWeights, Routing, expert_ffn
from loraloom.ops.low_rank import LowRankWeights, UpProjection
from loraloom.ops.triton_expert_ffn import fits_triton, triton_expert_ffn

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("default"),  # of compilers and drivers
]

T, D, F = 1000, 4096, 11008  # T is no multiple of a tile


class Case:
    """Random tensors on the GPU; `leaves` are those with gradients."""

    def __init__(
        self,
        num_experts: int,
        rank: int,
        dtype: torch.dtype,
        *,
        dropout: float = 0.0,
        decomposed: bool = False,
        routed: bool = True,
    ):
        self.generator = torch.Generator("cuda").manual_seed(0)
        self.num_experts, self.rank, size = num_experts, rank, num_experts * rank
        self.leaves = {
            "x": self.normal(T, D),
            "gate": self.normal(T, F),
            "up": self.normal(T, F),
            "input_A": self.normal(2 * size, D) / D**0.5,
            "gate_B": self.normal(size, F) / rank**0.5,
            "up_B": self.normal(size, F) / rank**0.5,
            "down_A": self.normal(size, F) / F**0.5,
            "down_B": self.normal(size, D) / rank**0.5,
        }
        self.top_k = 2 if routed else 1
        self.selected = None
        if routed:
            self.leaves["slot_logits"] = self.normal(T, self.top_k)
            self.selected = self.normal(T, num_experts).topk(self.top_k).indices
            self.selected[::97] = -1
        if decomposed:
            for name in ("gate_c", "up_c"):
                self.leaves[name] = 1 + 0.1 * self.normal(num_experts, F)
        self.bias = self.normal(F)
        keeps = [(self.normal(T, F) > 0) for _ in range(self.top_k)] if dropout else None
        self.keeps, self.dropout = keeps, dropout
        self.leaves = {
            name: leaf.to(torch.float32 if name in ("slot_logits", "gate_c", "up_c") else dtype)
            for name, leaf in self.leaves.items()
        }

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", generator=self.generator)

    def outputs(self, ffn, dtype: torch.dtype) -> list[Tensor]:
        """Compute output, hidden rows and gradients; their first D stand for the base's product."""
        names = list(self.leaves)
        leaves = {
            name: leaf.to(torch.promote_types(leaf.dtype, dtype)).detach().requires_grad_()
            for name, leaf in self.leaves.items()
        }
        weights = self.weights(leaves)
        routing = None
        if self.selected is not None:
            g = leaves["slot_logits"].softmax(-1)
            first = torch.nn.functional.one_hot(torch.zeros_like(self.selected[:, 0]), self.top_k)
            g = torch.where(self.selected[:, :1] >= 0, g, first.to(g.dtype))
            routing = Routing(self.selected, g)
        elif ffn is expert_ffn:  # which takes no None
            zeros = torch.zeros(T, 1, dtype=torch.long, device="cuda")
            routing = Routing(zeros, torch.ones(T, 1, device="cuda"))
        masks = FfnDropout.none(self.top_k)
        if self.keeps is not None:
            masks = FfnDropout(self.dropout, None, [keep.to(dtype) for keep in self.keeps])
        hidden, finish = ffn(
            leaves["x"], leaves["gate"], leaves["up"], weights, routing, silu, masks
        )
        output = finish(hidden[:, :D])
        generator = torch.Generator("cuda").manual_seed(1)
        loss = sum(
            (part.float() * torch.randn(part.shape, device="cuda", generator=generator)).sum()
            for part in (output, hidden)
        )
        return [output, hidden, *torch.autograd.grad(loss, [leaves[name] for name in names])]

    def weights(self, leaves: dict[str, Tensor]) -> FfnWeights:
        size = self.num_experts * self.rank
        bias = self.bias.to(leaves["gate"].dtype)
        return FfnWeights(
            leaves["input_A"],
            UpProjection(slice(0, size), leaves["gate_B"], leaves.get("gate_c"), bias),
            UpProjection(slice(size, 2 * size), leaves["up_B"], leaves.get("up_c"), bias),
            LowRankWeights(leaves["down_A"], leaves["down_B"]),
            None,
            self.num_experts,
            self.rank,
        )


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.bfloat16, 0.03), (torch.float16, 0.005), (torch.float32, 1e-4)]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_experts": 16},
        {"num_experts": 4, "rank": 10},
        {"dropout": 0.5},
        {"dropout": 0.5, "decomposed": True},
        {"num_experts": 1, "rank": 80, "routed": False},
    ],
    ids=str,
)
def test_output_and_gradients_are_those_of_the_specification(options, dtype, error):
    case = Case(**{"num_experts": 8, "rank": 16, "dtype": dtype, **options})
    assert fits_triton(case.leaves["gate"], case.weights(case.leaves), silu)
    ours = case.outputs(triton_expert_ffn, dtype)
    exact = case.outputs(expert_ffn, torch.float32)
    for name, actual, expected in zip(["output", "hidden", *case.leaves], ours, exact, strict=True):
        distance = (actual.float() - expected).norm() / expected.norm()
        assert distance < error, f"{name}: {distance:.2e}"


def test_equal_inputs_give_equal_bits():
    case = Case(8, 16, torch.bfloat16, dropout=0.5)
    first, again = (case.outputs(triton_expert_ffn, torch.bfloat16) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_host_is_not_waited_for():
    case = Case(8, 16, torch.bfloat16)
    case.outputs(triton_expert_ffn, torch.bfloat16)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.outputs(triton_expert_ffn, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
