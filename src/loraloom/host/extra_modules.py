"""Modules that adapters have in place of the base model's: whole copies, and rows of some tokens.

Axes: B batch, L sequence, D hidden, V vocabulary, N tokens with rows of their own.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from loraloom.adapters.contract import OwnModule
from loraloom.adapters.extra_modules import MODULES, TOKENS, OwnParts
from loraloom.base.quantization import is_linear, quantized_weight
from loraloom.distributed import gather
from loraloom.errors import AdapterError


class WholeModule(OwnModule):
    """A copy of a module, trained whole."""

    def __init__(self, path: str, weights: Mapping[str, nn.Parameter], *, is_linear: bool):
        super().__init__(path, is_linear=is_linear)
        for name, weight in weights.items():
            self.register_parameter(name, weight)

    def outputs(self, module: Any, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        # the class's forward with the copy's weights
        twin = copy.copy(module)
        twin.__dict__.pop("forward", None)
        # A parameter may be None.
        twin._parameters = {**twin._parameters, **weights}
        if isinstance(module, nn.LayerNorm):
            inputs = inputs.to(twin.weight.dtype)  # CUDA has no layer norm of two dtypes
        outputs = twin.forward(inputs)
        dtype = next(module.parameters(recurse=False)).dtype
        if self.is_linear:
            return outputs
        return outputs.to(dtype)

    def stored(self, name: str, weight: Tensor) -> Tensor:
        return self.get_parameter(name).detach()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self.named_parameters():
            yield f"{MODULES}{self.path}.{name}", weight.detach()


class OwnTokens(OwnModule):
    """Rows of an embedding or a head for some tokens; other tokens have the base model's."""

    def __init__(
        self, path: str, tokens: Tensor, rows: nn.Parameter, *, is_linear: bool, is_tied: bool
    ):
        super().__init__(path, is_linear=is_linear)
        self.rows = rows
        self.is_tied = is_tied
        self.register_buffer("tokens", tokens, persistent=False)

    def outputs(self, module: Any, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        outputs = type(module).forward(module, inputs)
        rows = weights["rows"]
        tokens = self.get_buffer("tokens")
        if self.is_linear:
            bias = module.bias
            if bias is not None:
                bias = bias[tokens]
            logits = linear(inputs, rows, bias)
            return outputs.index_copy(-1, tokens, logits.to(outputs.dtype))
        is_token = inputs.unsqueeze(-1).eq(tokens)  # (B, L, N)
        index = is_token.int().argmax(-1)
        vectors = embedding(index, rows)  # (B, L, D)
        scale = getattr(module, "embed_scale", None)  # of Gemma's embeddings
        if scale is not None:
            vectors = vectors * scale
        has_row = is_token.any(-1, keepdim=True)
        return torch.where(has_row, vectors.to(outputs.dtype), outputs)

    def stored(self, name: str, weight: Tensor) -> Tensor:
        if name != "weight":
            return weight
        rows = self.rows.detach()
        return weight.to(rows.dtype).index_copy(0, self.get_buffer("tokens"), rows)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        if not self.is_tied:  # else they are the embedding's
            yield f"{TOKENS}{self.path}", self.rows.detach()


def own_outputs(
    copy: OwnModule, weights: Mapping[str, Tensor], module: Any, inputs: Tensor, scale: float
) -> Tensor:
    """Compute what rows of an adapter get from a module; arguments as in `OwnModule.outputs`."""
    outputs = copy.outputs(module, weights, inputs)
    if scale == 1:
        return outputs
    base_outputs = type(module).forward(module, inputs)
    return base_outputs + scale * (outputs - base_outputs)


def build_own_modules(parts: OwnParts, model: nn.Module, dtype: torch.dtype) -> list[OwnModule]:
    """Copy what an adapter has as its own off the base model; tied heads behind their tables."""
    modules: dict[str, OwnModule] = {}
    paths = [path for path in (*parts.modules, *parts.tokens) if path not in parts.tied]
    for path in (*paths, *parts.tied):
        module = model.get_submodule(path)
        table = parts.tied.get(path, path)
        quantized = quantized_weight(module)
        if quantized is not None:
            raise AdapterError(
                "a module that an adapter has as its own must be in floating point, got "
                f"{path} in {quantized.kind}; load the base model without quantization"
            )
        weights = {}
        for name, weight in module.named_parameters(recurse=False):
            weights[name] = gather(weight).detach()
        if table not in parts.tokens:
            copies = {n: nn.Parameter(w.to(dtype, copy=True)) for n, w in weights.items()}
            modules[path] = WholeModule(path, copies, is_linear=is_linear(module))
            continue
        weight = weights["weight"]
        tokens = torch.tensor(parts.tokens[table], device=weight.device)
        shared = modules.get(table)
        if isinstance(shared, OwnTokens):
            rows = shared.rows
        else:
            rows = nn.Parameter(weight[tokens].to(dtype))
        modules[path] = OwnTokens(
            path, tokens, rows, is_linear=is_linear(module), is_tied=path in parts.tied
        )
    return list(modules.values())
