"""Modules that adapters have in place of the base model's: whole copies, and rows of some tokens.

Axes: B batch, L sequence, T tokens, D hidden, V vocabulary, N tokens with rows of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from loraloom.adapters.method import OwnModule
from loraloom.adapters.own import MODULES, TOKENS, OwnParts
from loraloom.errors import AdapterError
from loraloom.models.quantised import is_linear, quantised_weight
from loraloom.ranks import whole


class WholeModule(OwnModule):
    """A copy of a module, trained whole."""

    def __init__(self, path: str, weights: Mapping[str, nn.Parameter], *, is_linear: bool):
        super().__init__(path)
        self.is_linear = is_linear
        for name, weight in weights.items():
            self.register_parameter(name, weight)

    def compute_form(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """See OwnModule."""
        return {
            name: weight.to(dtype) if self.is_linear else weight
            for name, weight in self._parameters.items()
            if weight is not None
        }

    def outputs(
        self,
        module: nn.Module,
        weights: Mapping[str, Tensor],
        inputs: Tensor,
        base_forward: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Call the class's forward with the copy's weights."""
        twin: Any = copy.copy(module)
        twin.__dict__.pop("forward", None)
        twin._parameters = {**twin._parameters, **weights}  # a parameter may be None
        outputs = twin.forward(inputs)
        return outputs if self.is_linear else outputs.to(_dtype(module))

    def stored(self, name: str, weight: Tensor) -> Tensor:
        """See OwnModule."""
        return self.get_parameter(name).detach()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters."""
        for name, weight in self.named_parameters():
            yield f"{MODULES}{self.path}.{name}", weight.detach()


class OwnTokens(OwnModule):
    """Rows of an embedding or a head for some tokens; other tokens have the base model's."""

    def __init__(
        self,
        path: str,
        tokens: tuple[int, ...],
        rows: nn.Parameter,
        *,
        is_linear: bool,
        is_tied: bool = False,
    ):
        super().__init__(path)
        self.rows = rows
        self.is_linear = is_linear
        self.is_tied = is_tied
        places = torch.tensor(tokens, device=rows.device)
        self.register_buffer("tokens", places, persistent=False)

    def compute_form(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """See OwnModule."""
        return {"rows": self.rows.to(dtype) if self.is_linear else self.rows}

    def outputs(
        self,
        module: nn.Module,
        weights: Mapping[str, Tensor],
        inputs: Tensor,
        base_forward: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Put the tokens' own vectors, or logits, in place of the base model's."""
        outputs = base_forward(inputs)
        replaced = self._with_logits if self.is_linear else self._with_vectors
        return replaced(module, weights["rows"], inputs, outputs)

    def _with_vectors(
        self, module: nn.Module, rows: Tensor, input_ids: Tensor, outputs: Tensor
    ) -> Tensor:
        is_token = input_ids.unsqueeze(-1).eq(self.get_buffer("tokens"))  # (B, L, N)
        vectors = embedding(is_token.int().argmax(-1), rows)  # (B, L, D)
        scale = getattr(module, "embed_scale", None)
        if scale is not None:  # of Gemma's embeddings
            vectors = vectors * scale
        return torch.where(is_token.any(-1, keepdim=True), vectors.to(outputs.dtype), outputs)

    def _with_logits(
        self, module: nn.Module, rows: Tensor, hidden_states: Tensor, outputs: Tensor
    ) -> Tensor:
        bias: Any = module.bias
        logits = linear(
            hidden_states, rows, None if bias is None else bias[self.get_buffer("tokens")]
        )
        return outputs.index_copy(-1, self.get_buffer("tokens"), logits.to(outputs.dtype))

    def stored(self, name: str, weight: Tensor) -> Tensor:
        """See OwnModule."""
        if name != "weight":
            return weight
        rows = self.rows.detach()
        return weight.to(rows.dtype).index_copy(0, self.get_buffer("tokens"), rows)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the rows, where they are not the embedding's."""
        if not self.is_tied:
            yield f"{TOKENS}{self.path}", self.rows.detach()


def own_outputs(
    own: OwnModule,
    weights: Mapping[str, Tensor],
    module: nn.Module,
    inputs: Tensor,
    base_forward: Callable[[Tensor], Tensor],
    scale: float,
) -> Tensor:
    """Compute what rows of an adapter get from a module; arguments as in `OwnModule.outputs`."""
    outputs = own.outputs(module, weights, inputs, base_forward)
    if scale == 1:
        return outputs
    base_outputs = base_forward(inputs)
    return base_outputs + scale * (outputs - base_outputs)


def build_own_modules(parts: OwnParts, model: nn.Module, dtype: torch.dtype) -> list[OwnModule]:
    """Copy what an adapter has as its own off the base model."""
    own: dict[str, OwnModule] = {}
    for path in parts.modules:
        if path not in parts.tied:
            own[path] = _whole_module(model, path, dtype, {})
    for path, tokens in parts.tokens.items():
        module: Any = _floating(model, path)
        weight = whole(module.weight).detach()
        rows = weight[torch.tensor(tokens, device=weight.device)].to(dtype)
        own[path] = OwnTokens(path, tokens, nn.Parameter(rows), is_linear=is_linear(module))
    for head, table in parts.tied.items():
        shared = own[table]
        if isinstance(shared, OwnTokens):
            tokens = parts.tokens[table]
            own[head] = OwnTokens(head, tokens, shared.rows, is_linear=True, is_tied=True)
        else:
            weight = {"weight": shared.get_parameter("weight")}
            own[head] = _whole_module(model, head, dtype, weight)
    return list(own.values())


def _whole_module(
    model: nn.Module, path: str, dtype: torch.dtype, shared: Mapping[str, nn.Parameter]
) -> WholeModule:
    module = _floating(model, path)
    weights = {
        name: nn.Parameter(whole(weight).detach().to(dtype, copy=True))
        for name, weight in module.named_parameters(recurse=False)
        if name not in shared
    }
    return WholeModule(path, {**shared, **weights}, is_linear=is_linear(module))


def _floating(model: nn.Module, path: str) -> nn.Module:
    module = model.get_submodule(path)
    quantised = quantised_weight(module) if is_linear(module) else None
    if quantised is not None:
        raise AdapterError(
            f"a module that an adapter has as its own must be in floating point, got {path} in "
            f"{quantised.kind}; load the base model without quantization"
        )
    return module


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters(recurse=False)).dtype
