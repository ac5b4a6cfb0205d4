"""The way in: from a transformers model to a host of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from loraloom.models.host import Host


def attach(model: nn.Module) -> Host:
    """Freeze a transformers causal LM and make it a host of adapters.

    Args:
        model: Any causal LM of a supported family; it is changed in place until `detach()`.

    Raises:
        ModelError: If the family is not supported, or the model is attached already.
    """
    from loraloom.models.host import Host  # `import loraloom` stays free of torch

    return Host(model)
