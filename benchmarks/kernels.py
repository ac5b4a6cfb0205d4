"""Compile the Triton kernel for cards that are not here: registers, stack, shared memory.

It is compiled by Triton's own compiler and ptxas from the arguments of a block of Llama 2
7B, forward and backward. Nothing runs. Stack is what a thread keeps outside of its registers.

    python -m benchmarks.kernels [--capability 80 89 90] [--dtype bfloat16]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

from loraloom.ops.expert_ffn import FfnDropout, FfnWeights
from loraloom.ops.fused import kernels
from loraloom.ops.fused.expert_ffn import fused_hidden
from loraloom.ops.low_rank import UpProjection

FFN_SIZE, HIDDEN_SIZE, TOKENS = 11008, 4096, 64
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
}
Launches = dict[str, dict[str, Any]]


def main() -> None:
    """Print a line for each kernel and capability."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 89, 90])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    options = parser.parse_args()
    print(f"{'kernel':40} {'sm':>4} {'registers':>9} {'stack':>6} {'shared KB':>9}")
    for name, arguments in launches(getattr(torch, options.dtype)).items():
        for capability in options.capability:
            registers, stack, shared = compile_kernel(arguments, capability)
            print(f"{name:40} {capability:4} {registers:9} {stack:6} {shared / 1024:9.0f}")


def launches(dtype: torch.dtype) -> Launches:
    """Arguments of the kernel, forward and backward, as the blocks of two methods start it."""
    seen: Launches = {}
    for method, num_experts in (("LoRA", 0), ("MixLoRA", 8)):
        for arguments in started(num_experts, dtype):
            way = "forward" if arguments["grad_hidden"] is None else "backward"
            seen.setdefault(f"{method} {way}", arguments)
    return seen


def started(num_experts: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Go through an FFN block's kernels and note their arguments in place of running them."""
    taken: list[dict[str, Any]] = []

    class Noted:
        def __getitem__(self, grid: object):
            return lambda **arguments: taken.append(arguments)

    with patch.object(kernels, "hidden_kernel", Noted()):
        run_block(num_experts, dtype)
    return taken


def run_block(num_experts: int, dtype: torch.dtype) -> None:
    """Go through a block, forward and backward; no experts are a plain LoRA."""
    experts = routing_weights = None
    rank = 16 if num_experts else 80
    if num_experts:
        experts = torch.zeros(2, TOKENS, dtype=torch.long)
        routing_weights = torch.ones(TOKENS, 2, requires_grad=True)
    count = max(1, num_experts)
    size = count * rank

    def leaf(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    def side(start: int, width: int) -> UpProjection:
        return UpProjection(slice(start, start + size), leaf(size, width))

    weights = FfnWeights(
        leaf(2 * size, HIDDEN_SIZE), side(0, FFN_SIZE), side(size, FFN_SIZE),
        leaf(size, FFN_SIZE), side(0, HIDDEN_SIZE), count, rank,
    )  # fmt: skip
    hidden, down_rank = fused_hidden(
        leaf(TOKENS, FFN_SIZE), leaf(TOKENS, FFN_SIZE), leaf(TOKENS, 2 * size), weights, experts,
        routing_weights, FfnDropout.none(2),
    )  # fmt: skip
    (hidden.sum() + down_rank.sum()).backward()


def compile_kernel(arguments: dict[str, Any], capability: int) -> tuple[int, int, int]:
    """Return registers and stack bytes of a thread, and shared bytes of a block."""
    kernel: Any = kernels.hidden_kernel
    signature, constants, attributes = {}, {}, {}
    for place, argument in enumerate(kernel.arg_names):
        value = arguments[argument]
        if isinstance(value, torch.Tensor):
            signature[argument] = POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int) and value != 1 and not argument.isupper():
            signature[argument] = "i32"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[argument] = "fp32"
        else:
            signature[argument], constants[argument] = "constexpr", value
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target, {"num_warps": arguments["num_warps"]})
    return *resources(compiled.asm["cubin"]), compiled.metadata.shared


def resources(cubin: bytes) -> tuple[int, int]:
    """Return what CUDA's tools tell of a program: registers and stack bytes of a thread."""
    program = Path(str(triton.__file__)).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    main()
