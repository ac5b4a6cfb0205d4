"""LoRA, DoRA, MixLoRA and MixDoRA the slow way: dense weights, and loops over tokens and slots.

Axes: B batch, L sequence, D hidden, F feed-forward, E experts.

The oracle takes a plain transformers model and replaces the forwards of its linear layers and FFN
blocks. Every weight is materialised as `W + s·B·A`; experts are called one token at a time. It
shares no arithmetic with loraloom, only the names of tensors and, in training, the random masks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.activations import ACT2FN

from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.base.blocks import BaseInfo
from loraloom.ops.dropout import SampleNoise, SampleSpan, Site
from tests.blocks import block_of

OUTPUT_PROJECTIONS = ("o_proj", "dense")


@dataclass
class RandomMasks:
    """Dropout and jitter of each row, drawn for it alone."""

    sample_keys: Sequence[int]
    mask: Tensor

    def keep(self, layer: int, site: int, num_features: int, dropout: float) -> Tensor:
        """Return what dropout multiplies with, [B, L, N]."""
        draw = lambda noise: noise.keep_mask(site, num_features, dropout)  # noqa: E731
        return self._rows(layer, draw) / (1 - dropout)

    def jitter(self, layer: int, num_features: int, amount: float) -> Tensor:
        """Return what multiplies the router's input, [B, L, N]."""
        draw = lambda noise: noise.jitter(Site.ROUTER_JITTER, num_features, amount)  # noqa: E731
        return self._rows(layer, draw)

    def _rows(self, layer: int, draw: Callable[[SampleNoise], Tensor]) -> Tensor:
        rows = []
        for key, real in zip(self.sample_keys, self.mask, strict=True):
            places = real.nonzero().squeeze(1)
            span = SampleSpan(key, slice(0, len(places)))
            values = draw(SampleNoise((span,), len(places), layer, torch.device("cpu")))
            row = torch.ones(len(real), values.shape[1], dtype=torch.float64)
            row[places] = values.double()
            rows.append(row)
        return torch.stack(rows)


@dataclass
class DenseAdapter:
    """One adapter for all rows of a batch.

    Args:
        config: The adapter's settings.
        base: The base model's layout.
        tensors: Its weights by name, with gradient where wanted.
        mask: 1 at real tokens, [B, L].
        masks: Dropout and jitter; None outside training.
        scale: Factor of what the adapter adds to each projection.
        router_logits: Filled by a forward: each layer's, of real tokens.
    """

    config: LoraConfig
    base: BaseInfo
    tensors: Mapping[str, Tensor]
    mask: Tensor
    masks: RandomMasks | None = None
    scale: float = 1.0
    router_logits: list[Tensor] = field(default_factory=list)

    def attach(self, model: nn.Module) -> nn.Module:
        """Replace the model's forwards."""
        base = self.base
        for index in range(base.num_layers):
            layer = model.get_submodule(f"{base.layers_path}.{index}")
            for name in block_of(base, "attention").shapes:
                self._replace(layer, index, block_of(base, "attention").path, name)
            if isinstance(self.config, MixLoraConfig):
                block = layer.get_submodule(self.ffn_path)
                block.forward = lambda x, i=index, b=block: self._mixture(i, b, x)
                continue
            for name in self.ffn_names:
                self._replace(layer, index, self.ffn_path, name)
        return model

    @property
    def ffn_path(self) -> str:
        return block_of(self.base, "ffn").path

    @property
    def ffn_names(self) -> list[str]:
        return [*block_of(self.base, "ffn").shapes]

    def _replace(self, layer: nn.Module, index: int, block: str, name: str) -> None:
        module, key = layer.get_submodule(f"{block}.{name}"), f"layers.{index}.{block}.{name}"
        if f"{key}.lora_A" not in self.tensors:
            return
        if block == self.ffn_path:
            site = Site.FFN_SLOT if name == self.ffn_names[-1] else Site.FFN_INPUT
        else:
            site = Site.ATTENTION_OUTPUT if name in OUTPUT_PROJECTIONS else Site.ATTENTION_INPUT
        module.forward = lambda x: self._dense(
            module, key, self.config, x, self._drop(x, index, site)
        )

    def _drop(self, x: Tensor, layer: int, site: int) -> Tensor:
        config = self.config
        dropout = config.dropout
        if isinstance(config, MixLoraConfig) and site in (Site.FFN_INPUT, *self._slot_sites()):
            dropout = config.expert_config.dropout
        if self.masks is None or dropout == 0:
            return x
        return x * self.masks.keep(layer, site, x.shape[-1], dropout)

    def _slot_sites(self) -> range:
        return range(Site.FFN_SLOT, Site.FFN_SLOT + self._num_slots)

    @property
    def _num_slots(self) -> int:
        config = self.config
        return {"top_k": config.top_k, "switch": 1}.get(config.routing, config.num_experts)

    def _choose(self, logits: Tensor) -> list[tuple[Tensor, int]]:
        """Weight and number of each expert that a token uses, best first."""
        config = self.config
        scaled = logits
        if config.routing == "top_p" and config.compat is None:
            scaled = logits / config.temperature
        probability = scaled.softmax(0)
        if config.routing == "top_p" and config.compat is not None:
            probability = probability / config.temperature
        values = probability.tolist()
        order = sorted(range(len(values)), key=lambda e: -values[e])
        if config.routing == "switch":
            order = order[:1]
        elif config.routing == "top_p":
            sums = [sum(values[e] for e in order[:n]) for n in range(len(order))]
            order = [e for e, before in zip(order, sums, strict=True) if before <= config.top_p]
        elif config.routing == "top_k":
            order = order[: config.top_k]
            total = sum(probability[e] for e in order)
            return [(probability[e] / total, e) for e in order]
        return [(probability[e], e) for e in order]

    def _dense(
        self, module: nn.Module, key: str, config: LoraConfig, x: Tensor, dropped: Tensor
    ) -> Tensor:
        """Compute `c ∘ (W x + s B A dropped) + b`, or `(W + s B A) x + b` where nothing drops."""
        if f"{key}.lora_A" not in self.tensors:
            return linear(x, module.weight, module.bias)
        update = config.scaling * self.tensors[f"{key}.lora_B"] @ self.tensors[f"{key}.lora_A"]
        dense = module.weight + update
        if dropped is x:
            output = linear(x, dense)
        else:
            output = linear(x, module.weight) + linear(dropped, update)
        if config.weight_decomposition:
            norms = dense.detach().square().sum(1).sqrt()
            output = output * self.tensors[f"{key}.magnitude"] / norms
        base = linear(x, module.weight)
        output = base + self.scale * (output - base)
        return output if module.bias is None else output + module.bias

    def _mixture(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        """Run an FFN block token by token."""
        config, names = self.config, self.ffn_names
        act = ACT2FN[self.base.activation]
        routed, dropped = x, self._drop(x, index, Site.FFN_INPUT)
        if self.masks is not None and config.router_jitter > 0:
            routed = x * self.masks.jitter(index, x.shape[-1], config.router_jitter)
        keeps = [None] * self._num_slots
        if self.masks is not None and config.expert_config.dropout > 0:
            size = block.get_submodule(names[-1]).in_features
            keeps = [
                self.masks.keep(index, site, size, config.expert_config.dropout)
                for site in self._slot_sites()
            ]
        router, rows, logits = self.tensors[f"layers.{index}.{self.ffn_path}.router"], [], []
        for row in range(x.shape[0]):
            outputs = []
            for place in range(x.shape[1]):
                expert = lambda e, keep, at=(row, place): self._expert(  # noqa: E731
                    block, index, act, e, x[at], dropped[at], None if keep is None else keep[at]
                )
                if self.mask[row, place] == 0:
                    outputs.append(expert(None, None))
                    continue
                logits.append(router @ routed[row, place])
                parts = [
                    weight * expert(e, keep)
                    for (weight, e), keep in zip(self._choose(logits[-1]), keeps, strict=False)
                ]
                outputs.append(sum(parts))
            rows.append(torch.stack(outputs))
        self.router_logits.append(torch.stack(logits))
        return torch.stack(rows)

    def _expert(
        self,
        block: nn.Module,
        index: int,
        act: Callable[[Tensor], Tensor],
        expert: int | None,
        x: Tensor,
        dropped: Tensor,
        keep: Tensor | None,
    ) -> Tensor:
        """Compute one expert's FFN for one token; expert None is the base's."""
        *inputs, output = self.ffn_names

        def project(name: str, values: Tensor, kept: Tensor) -> Tensor:
            key = f"layers.{index}.{self.ffn_path}.{name}.experts.{expert}"
            module = block.get_submodule(name)
            return self._dense(module, key, self.config.expert_config, values, kept)

        values = [project(name, x, dropped) for name in inputs]
        if inputs == ["gate_up_proj"]:
            values = list(values[0].chunk(2))
        hidden = act(values[0])
        if len(values) == 2:
            hidden = hidden * values[1]
        return project(output, hidden, hidden if keep is None else hidden * keep)
