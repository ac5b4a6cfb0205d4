"""Elementwise work that a compiler fuses on accelerators, where it waits for memory.

TorchInductor makes kernels of what lies between products, for each configuration of a block once
and for any number of tokens; PyTorch keeps them on disk. `TORCH_COMPILE_DISABLE=1` turns it off. On
a CPU pieces of tokens stay in the processor's cache, and nothing is compiled.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache, update_wrapper
from typing import Any, TypeVar

import torch
from torch import Tensor

# Kinds of devices that Inductor has a back end for.
COMPILED_FOR = ("cuda", "xpu")
# Configurations of blocks and adapters that one process may meet.
_MAX_CONFIGURATIONS = 64
_Function = TypeVar("_Function", bound=Callable[..., Any])
_failed = set[Callable[..., Any]]()


def fused_on_accelerators(function: _Function) -> _Function:
    """Compile a function where its first tensor is; if that fails, warn once and compute as is."""

    def call(*args: Any) -> Any:
        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        if device.type not in COMPILED_FOR or function in _failed:
            return function(*args)
        try:
            return compiled(function)(*args)
        except Exception as error:
            from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

            if not isinstance(error, TorchDynamoException | FailOnRecompileLimitHit):
                raise
            _failed.add(function)
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"{function.__name__} is not compiled: {reason}", stacklevel=2)  # ty: ignore[missing-attribute]
            return function(*args)

    return update_wrapper(call, function)  # ty: ignore[invalid-explicit-return]


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function as one graph, for any number of rows."""
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, _MAX_CONFIGURATIONS)  # ty: ignore[invalid-assignment]
    return torch.compile(function, fullgraph=True, dynamic=True)


def without_graph(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """See tensors as a compiled function should, which computes gradients by itself."""
    return [None if tensor is None else tensor.data for tensor in tensors]


def plus_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Compute `total + left @ right`; compiled, the sum is left to the kernel that reads it."""
    if torch.compiler.is_compiling():
        return total + left @ right
    return torch.addmm(total, left, right)
