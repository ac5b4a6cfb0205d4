"""The way in: from a transformers model to a host of adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loraloom.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

    from loraloom.models.host import Host


def attach(model: nn.Module) -> Host:
    """Freeze a transformers causal LM and make it a host of adapters.

    Args:
        model: A causal LM of a family in the table, or one that is built and computes like them;
            it is changed in place until `detach()`.

    Raises:
        ModelError: If it is no model or a host, the family is not supported, or the model is
            attached already.
    """
    from torch import nn  # `import loraloom` stays free of torch

    from loraloom.models.host import Host

    if isinstance(model, Host):
        raise ModelError("attach takes a model, got a host, which is one attached; use it as it is")
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"attach takes a causal LM of transformers, got {type(model).__name__}; "
            "loraloom.load_base_model loads one by its name"
        )
    return Host(model)
