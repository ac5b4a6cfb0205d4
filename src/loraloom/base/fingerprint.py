"""What tells base models of one shape apart, whatever dtype they are read in.

A fingerprint is a hash of all norms and biases, and of a number in each row of each matrix: of the
embeddings, every projection and expert, and the head. A 7B model takes a fraction of a second.
Adapters of earlier versions have the first form: 64 numbers of each projection in three layers, in
which edited embeddings, norms, heads and other layers go unnoticed. They are compared by it.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from loraloom.base.blocks import BaseLayer, BaseProjection, Block, BlockInfo
from loraloom.base.quantization import quantized_linears
from loraloom.distributed import gather

_FORM = "v2-"
# float16 has at least bfloat16's digits in numbers from here on, and fewer below.
_SMALLEST = 2.0**-14


def fingerprint(model: Any, blocks: Sequence[BlockInfo], layers: Sequence[BaseLayer]) -> str:
    digest = _digest_of_shapes(model, blocks, layers)
    for weight in _weights(model):
        if not weight.is_meta:  # a model without weights is known by its shapes
            digest.update(_bytes(_sample(weight)))
    return _FORM + digest.hexdigest()[:16]


def first_fingerprint(model: Any, blocks: Sequence[BlockInfo], layers: Sequence[BaseLayer]) -> str:
    # of the blocks that those versions knew
    digest = _digest_of_shapes(model, [block for block in blocks if _is_first(block)], layers)
    adapted = list[list[BaseProjection]]()
    for layer in layers:
        projections = list[BaseProjection]()
        for block in filter(_is_first, layer.blocks):
            projections += block.projections.values()
        if projections:
            adapted.append(projections)
    middle = adapted[len(adapted) // 2]
    for projection in (*adapted[0], *middle, *adapted[-1]):
        if projection.device.type != "meta":
            corner = projection.weight.detach().flatten()[:64]
            digest.update(_bytes(corner.to(torch.bfloat16)))
    return digest.hexdigest()[:16]


def _is_first(block: Block | BlockInfo) -> bool:
    return block.kind in ("attention", "ffn") and "." not in block.path


def _digest_of_shapes(model: Any, blocks: Sequence[BlockInfo], layers: Sequence[BaseLayer]) -> Any:
    shapes = {}
    for block in blocks:
        shapes |= {f"{block.path}.{name}": shape for name, shape in block.shapes.items()}
    text = f"{model.config.model_type} {len(layers)} {sorted(shapes.items())}"
    return hashlib.sha256(text.encode())


def _weights(model: Any) -> Iterator[Tensor]:
    """Yield the text model's weights in their order, and the head's, tied to the others or not."""
    quantized = {id(weight.linear): weight for weight in quantized_linears(model).values()}
    for module in (*model.get_decoder().modules(), model.get_output_embeddings()):
        weight = quantized.get(id(module))
        for name, parameter in module.named_parameters(recurse=False):
            if weight is None or name != "weight" or parameter.is_meta:
                yield gather(parameter)
            else:
                yield weight.dequantized()


def _sample(weight: Tensor) -> Tensor:
    """Take all of a vector, or a number in each row, as it is in every dtype."""
    step = 1
    if weight.dim() > 1:
        step = max(1, weight.shape[-1] - 1)
    numbers = weight.detach().flatten()[::step].to(torch.bfloat16)
    return numbers.masked_fill(numbers.abs() < _SMALLEST, 0.0)


def _bytes(numbers: Tensor) -> bytes:
    stored = numbers.contiguous().view(torch.uint8)
    return stored.cpu().numpy().tobytes()
