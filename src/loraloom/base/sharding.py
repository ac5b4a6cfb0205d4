"""A frozen base model of which every rank keeps a part (PyTorch's FSDP2).

A layer's weights are put together for its forward, and again for its backward pass. Embedding,
final norm and head stay together from a forward on to the end of the backward pass, as losses are
computed outside of the model's own forward.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from loraloom.base.structure import find_layers


def sharded_class(model_class: type[Any], device: torch.device) -> type[Any]:
    """Return the class whose models have a rank's part of each weight, on its device.

    All ranks of the default group make one together. Layers are brought to the device one after the
    other, so that it never has the whole model.
    """

    # `from_pretrained` makes a model without data, and reads of each tensor what this rank keeps.
    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        model_class.__init__(self, *args, **kwargs)
        layers = self.get_submodule(find_layers(self))
        self.requires_grad_(False)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in layers.children():
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(self, mesh=mesh)

    return type(model_class.__name__, (model_class,), {"__init__": initialise})


def decoder_of(model: Any, undo: ExitStack) -> Callable[..., Any]:
    """Return the forward up to the final norm; a sharded model must be entered by its root.

    `undo` restores the model.
    """
    if not isinstance(model, FSDPModule):
        return model.base_model
    root: Any = model
    undo.callback(vars(model).pop, "run_decoder")
    root.run_decoder = MethodType(lambda self, **inputs: self.base_model(**inputs), root)
    register_fsdp_forward_method(root, "run_decoder")
    return root.run_decoder


@contextmanager
def recovering(model: nn.Module) -> Iterator[None]:
    """Leave a sharded model ready for another forward where one, or a backward pass, fails."""
    try:
        yield
    except Exception:
        if isinstance(model, FSDPModule):
            model.reset_iter_state()
        raise
