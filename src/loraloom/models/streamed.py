"""A checkpoint's model as transformers computes it, with the weights of one module at a time.

Of a linear layer outside of the decoder layers, which is the head, some rows are read at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from loraloom.formats.checkpoint import read_index
from loraloom.models.whole import WholeModel

_BLOCK_NUMBERS = 1 << 22
"""Numbers of a head that are read at a time."""


def streamed_model(whole: WholeModel, directory: Path) -> PreTrainedModel:
    """Make a model that reads each module's weights when it runs, and then lets them go."""
    files = {name: directory / file for name, file in read_index(directory).items()}
    with init_empty_weights(include_buffers=False):
        model = whole.empty().eval()
    layers_path = whole.host.base.layers_path
    for index, layer in enumerate(model.get_submodule(layers_path).children()):
        read = partial(_read, files, f"{layers_path}.{index}.", whole.layer_parts)
        _read_when_run(layer, read)
    for path, module in model.named_modules():
        if path.startswith(f"{layers_path}.") or not list(module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Linear):
            weight = model.all_tied_weights_keys.get(f"{path}.weight", f"{path}.weight")
            module.forward = partial(_product, files, module, weight, f"{path}.bias")
        else:
            _read_when_run(module, partial(_read, files, f"{path}.", None))
    return model


def _product(
    files: dict[str, Path], module: nn.Linear, weight: str, bias: str, input: Tensor
) -> Tensor:
    step = max(1, _BLOCK_NUMBERS // module.in_features)
    outputs = []
    for start in range(0, module.out_features, step):
        with safe_open(files[weight], framework="pt") as shard:  # anew: what it reads, it keeps
            rows = shard.get_slice(weight)[start : start + step]
        outputs.append(linear(input, rows.float()))
    output = torch.cat(outputs, -1)
    return output if module.bias is None else output + _stored(files, bias).float()


def _read_when_run(module: nn.Module, read: Callable[[str, Tensor], Tensor]) -> None:
    shapes = module.state_dict()

    def enter(*_: Any) -> None:
        tensors = {name: read(name, empty) for name, empty in shapes.items()}
        module.load_state_dict(tensors, assign=True)

    def leave(*_: Any) -> None:
        module.load_state_dict(shapes, assign=True)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _read(
    files: dict[str, Path],
    prefix: str,
    parts_of: Callable[..., Any] | None,
    name: str,
    empty: Tensor,
) -> Tensor:
    """Put a tensor together from its parts in the files, in float32."""
    parts = {name: ()} if parts_of is None else parts_of(name, empty.shape)
    if len(parts) == 1:
        return _stored(files, prefix + next(iter(parts))).float().view(empty.shape)
    value = torch.empty_like(empty, dtype=torch.float32, device="cpu")
    for stored, place in parts.items():
        value[place] = _stored(files, prefix + stored)
    return value


def _stored(files: dict[str, Path], name: str) -> Tensor:
    with safe_open(files[name], framework="pt") as shard:
        return shard.get_tensor(name)
