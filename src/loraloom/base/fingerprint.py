"""What tells base models of one shape apart, whatever dtype they are read in.

A fingerprint is a hash of all norms and biases, and of a number in each row of each matrix: of the
embeddings, every projection and expert, and the head. A 7B model takes a fraction of a second.
Those of version 0.1.0 have another form, of fewer numbers, and are not compared.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from loraloom.base.blocks import FINGERPRINT_FORM, BlockInfo, QuantizedWeight
from loraloom.distributed import gather

# float16 has at least bfloat16's digits in numbers from here on, and fewer below.
_SMALLEST = 2.0**-14


def fingerprint(
    model: Any,
    blocks: Sequence[BlockInfo],
    num_layers: int,
    quantized: Iterable[QuantizedWeight],
) -> str:
    shapes = {}
    for block in blocks:
        shapes |= {f"{block.path}.{name}": shape for name, shape in block.shapes.items()}
    text = f"{model.config.model_type} {num_layers} {sorted(shapes.items())}"
    digest = hashlib.sha256(text.encode())
    for weight in _weights(model, quantized):
        if not weight.is_meta:  # a model without weights is known by its shapes
            digest.update(_sample(weight))
    return FINGERPRINT_FORM + digest.hexdigest()[:16]


def _weights(model: Any, quantized: Iterable[QuantizedWeight]) -> Iterator[Tensor]:
    """Yield the text model's weights in their order, and the head's, tied to the others or not."""
    by_module = {weight.linear: weight for weight in quantized}
    for module in (*model.get_decoder().modules(), model.get_output_embeddings()):
        weight = by_module.get(module)
        for name, parameter in module.named_parameters(recurse=False):
            if weight is None or name == "bias" or parameter.is_meta:
                yield gather(parameter)
            else:
                yield weight.dequantized()


def _sample(weight: Tensor) -> bytes:
    """Take all of a vector, or a number in each row, as it is in every dtype."""
    step = 1
    if weight.dim() > 1:
        step = max(1, weight.shape[-1] - 1)
    numbers = weight.detach().flatten()[::step].to(torch.bfloat16)
    rounded = numbers.masked_fill(numbers.abs() < _SMALLEST, 0.0)
    return rounded.contiguous().view(torch.uint8).cpu().numpy().tobytes()
