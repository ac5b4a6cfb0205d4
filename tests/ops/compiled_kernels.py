"""The kernels compile for GPUs that are not here; `test_triton_expert_ffn.py` runs this file.

The function is called as on a GPU with its launches written down, and each is compiled for a
compute capability: that shows types and shapes that Triton refuses and too much shared memory,
which the interpreter does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch.nn.functional import gelu, silu
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraloom.ops import expert_ffn_kernels as kernels
from loraloom.ops.expert_ffn import FfnDropout, FfnWeights, Routing
from loraloom.ops.low_rank import LowRankWeights, UpProjection
from loraloom.ops.triton_expert_ffn import triton_expert_ffn

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # triton 3.9 tells all

T, D, F = 256, 64, 256
NAMES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}
SHARED_BYTES = {86: 99 << 10, 90: 227 << 10}  # what a program may use; 8.6 has the least since 8.0
SETTINGS: dict[str, dict[str, Any]] = {
    "mixture": {},
    "wide mixture": {"num_experts": 16, "rank": 16},
    "narrow mixture": {"num_experts": 4, "rank": 2, "dtype": torch.float16},
    "float32": {"dtype": torch.float32, "top_k": 3},
    "dropout and DoRA": {"dropout": True, "decomposed": True},
    "ungated": {"gated": False, "act": gelu, "dropout": True},
    "plain LoRA": {"num_experts": 1, "rank": 80, "routed": False},
}

Launch = tuple[Any, dict[str, Any]]


class Recorder:
    """Stands for a kernel and writes its launches down."""

    def __init__(self, kernel: Any, launches: list[Launch]):
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, programs: tuple[int, int]) -> Callable[..., None]:
        return lambda **arguments: self.launches.append((self.kernel, arguments))


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_kernels_compile(setting, capability, monkeypatch):
    launches: list[Launch] = []
    for name in ("forward_kernel", "token_kernel", "feature_kernel"):
        monkeypatch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
    forward_and_backward(**SETTINGS[setting])
    assert len(launches) == 3
    for kernel, arguments in launches:
        compiled = compile_launch(kernel, arguments, GPUTarget("cuda", capability, 32))
        assert compiled.metadata.shared <= SHARED_BYTES[capability]


def compile_launch(kernel: Any, arguments: dict[str, Any], target: GPUTarget) -> Any:
    """Compile a kernel for the arguments of a launch, pointers and sizes divisible by 16."""
    signature, constants, hints = {}, {}, {}
    divisible = [["tt.divisibility", 16]]
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, tuple):
            signature[parameter.name] = tuple(NAMES[tensor.dtype] for tensor in value)
            hints |= {(index, position): divisible for position in range(len(value))}
        else:
            tensor = isinstance(value, torch.Tensor)
            signature[parameter.name] = NAMES[value.dtype] if tensor else "i32"
            if tensor or value % 16 == 0:
                hints[(index,)] = divisible
    source = ASTSource(kernel, signature, constants, hints)
    return triton.compile(source, target=target, options={"num_warps": arguments["num_warps"]})


def forward_and_backward(
    num_experts: int = 8,
    rank: int = 16,
    top_k: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    act: Callable[[torch.Tensor], torch.Tensor] = silu,
    *,
    gated: bool = True,
    routed: bool = True,
    dropout: bool = False,
    decomposed: bool = False,
) -> None:
    size = num_experts * rank

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def scale(features: int) -> torch.Tensor | None:
        return torch.ones(num_experts, features, requires_grad=True) if decomposed else None

    def side(first: int) -> UpProjection:
        columns = slice(first * size, (first + 1) * size)
        return UpProjection(columns, zeros(size, F), scale(F), zeros(F).detach())

    weights = FfnWeights(
        zeros(2 * size, D),
        side(0),
        side(1) if gated else None,
        LowRankWeights(zeros(size, F), zeros(size, D), scale(D)),
        None,
        num_experts,
        rank,
    )
    top_k = top_k if routed else 1
    routing = None
    if routed:
        routing = Routing(torch.zeros(T, top_k, dtype=torch.long), zeros(T, top_k))
    masks = FfnDropout.none(top_k)
    if dropout:
        masks = FfnDropout(0.1, zeros(T, D).detach(), [zeros(T, F).detach()] * top_k)
    gate, up = zeros(T, F), zeros(T, F) if gated else None
    hidden, _ = triton_expert_ffn(zeros(T, D), gate, up, weights, routing, act, masks)
    hidden.float().sum().backward()
