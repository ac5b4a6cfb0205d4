"""Work without gradients that is done in halves where memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from loraloom.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")


def free_memory() -> None:
    """Give back what is not used; the error that said so must be gone, it holds activations."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def too_large(item: str) -> DataError:
    """The error of what does not fit into memory by itself."""
    return DataError(
        f"{item} must fit into memory, it doesn't, even alone; free memory on the device, or load "
        "the base model in bfloat16"
    )


def in_halves(
    compute: Callable[[Sequence[Item]], list[Result]],
    items: Sequence[Item],
    describe: Callable[[Item], str],
) -> list[Result]:
    """Compute items together, or in halves, and halves of these, where memory runs out."""
    try:
        return compute(items)
    except torch.OutOfMemoryError:
        if len(items) == 1:
            raise too_large(describe(items[0])) from None
    free_memory()
    middle = (len(items) + 1) // 2
    return [
        result
        for half in (items[:middle], items[middle:])
        for result in in_halves(compute, half, describe)
    ]
