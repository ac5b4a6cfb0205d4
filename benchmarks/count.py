"""What a training step launches and moves, counted on the meta device: the same on any machine.

Axes: N decoder layers.

A step of a model of two and of three layers is run without data; their difference is a layer's
share, from which the whole model follows. The step is the decoder's forward and backward pass; the
head, its loss and the optimizer are left out, as they cost the same in every case. An operation's
bytes are those of its inputs and outputs, so that views are free; a card needs for it the time of
its bytes or of its products, whichever is longer, or that of launching it.

What loraloom compiles on accelerators is counted by TorchInductor's own figures: it is compiled for
the CPU, with the same numbers of tokens and features, where kernels are cut much as on a card.

Two checks of transformers, which read the mask of a forward once to see whether something is
masked, are answered without data.

    python -m benchmarks.count --shape 7b --card H100
"""

from __future__ import annotations

import argparse
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

from benchmarks.cases import (
    ADAPTERS,
    StepSetting,
    adapter_config,
    add_cases,
    add_options,
    chosen_setting,
    print_figures,
)
from loraloom.host.host import Host
from loraloom.ops import fused, slot_pieces


@dataclass(frozen=True)
class Shape:
    """A Llama model's sizes."""

    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    num_layers: int


SHAPES: Mapping[str, Shape] = {
    "7b": Shape(4096, 11008, 32, 32, 32),
    "13b": Shape(5120, 13824, 40, 40, 40),
    "70b": Shape(8192, 28672, 64, 8, 80),
}
"""Llama 2's."""


@dataclass(frozen=True)
class Card:
    """What an accelerator can do at best: bytes a second, dense bfloat16 FLOPs a second."""

    bandwidth: float
    flops: float


CARDS: Mapping[str, Card] = {
    "H100": Card(3.35e12, 989e12),
    "A100": Card(2.04e12, 312e12),
    "4090": Card(1.01e12, 165e12),
    "L4": Card(0.30e12, 121e12),
}
"""By their data sheets (SXM for H100 and A100 with 80 GB); sparse figures halved."""

LAUNCH_SECONDS = 5e-6
"""What launching an operation from PyTorch takes."""

PEFT_COUNTED = ("peft-lora", "peft-bf16")
"""PEFT's LoRA as it trains by default, with float32 adapters, and with adapters in bfloat16."""

BASE_FORWARD = "base-forward"
"""The base model alone, which no training step can do without: a forward that keeps nothing."""

COUNTED = (*PEFT_COUNTED, BASE_FORWARD, *ADAPTERS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    defaults = StepSetting(rows=8, length=512, rank=16)
    add_options(parser, defaults, "rows", "length", "rank", "num_experts", "top_k")
    parser.add_argument("--lora-rank", type=int, default=80, help="without experts")
    parser.add_argument("--shape", choices=SHAPES, default="7b", help="of Llama 2")
    parser.add_argument("--card", choices=CARDS, default="H100")
    add_cases(parser, COUNTED, rounds=1)
    options = parser.parse_args(arguments)
    figures = {}
    for name in options.cases:
        shape = SHAPES[options.shape]
        counted = count_step(name, shape, chosen_setting(options), options.lora_rank)
        figures[name] = {
            "operations": counted.operations,
            "GB moved": counted.bytes / 1e9,
            "peak GB": counted.peak_bytes / 1e9,
            f"{options.card} s": counted.time_on(options.card),
        }
    print_figures(figures)


@dataclass(frozen=True)
class Count:
    """What a step does.

    Args:
        operations: Launched; views left out.
        bytes: Read and written by them.
        flops: Of products.
        peak_bytes: Most that was alive at once, beside the weights.
        seconds: By card, what its bandwidth and products allow.
    """

    operations: float
    bytes: float
    flops: float
    peak_bytes: float
    seconds: Mapping[str, float]

    def time_on(self, card: str) -> float:
        """Return the seconds that a card needs at best, launching included."""
        return max(self.seconds[card], self.operations * LAUNCH_SECONDS)

    def with_layers(self, more: Count, num_layers: int) -> Count:
        """Extend a count of two layers to N, given one of three."""

        def extended(two: float, three: float) -> float:
            return two + (num_layers - 2) * (three - two)

        return Count(
            extended(self.operations, more.operations),
            extended(self.bytes, more.bytes),
            extended(self.flops, more.flops),
            extended(self.peak_bytes, more.peak_bytes),
            {card: extended(self.seconds[card], more.seconds[card]) for card in self.seconds},
        )


def count_step(case: str, shape: Shape, setting: StepSetting, lora_rank: int) -> Count:
    """Count a step of a whole model."""

    def make_step(num_layers: int) -> Callable[[], object]:
        model = make_model(replace(shape, num_layers=num_layers))
        return _make_step(case, model, setting, lora_rank)

    return count_layers(make_step, shape.num_layers)


def count_layers(make_step: Callable[[int], Callable[[], object]], num_layers: int) -> Count:
    """Count a step of N layers, from those of two and of three."""
    two, three = (_count(make_step(layers)) for layers in (2, 3))
    return two.with_layers(three, num_layers)


def _count(step: Callable[[], object]) -> Count:
    counter = _Counter()
    with (
        without_reads(),
        patch.object(fused, "COMPILED_FOR", ("meta",)),
        patch.object(fused, "compiled", counter.compiled),
        counter,
    ):
        step()
    return counter.count()


_inductor_costs: dict[Any, tuple[int, int]] = {}


def inductor_cost(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[int, int]:
    """Give the bytes that a compiled function moves, and its kernels."""
    # which takes a second, and warns
    from torch._inductor import config, metrics
    from torch._inductor.fx_passes import post_grad

    arguments = [_on_cpu(argument) for argument in arguments]
    key = (function, str(arguments))  # of zeros, so that it says sizes and settings
    if key not in _inductor_costs:
        torch._dynamo.reset()
        metrics.reset()
        # Bytes are counted for this log alone.
        logger = logging.getLogger("torch._inductor.compile_fx.__inductor_metrics")
        logger.setLevel(logging.INFO)
        logger.propagate = False
        with (
            patch.object(slot_pieces, "_piece_rows", lambda width, dtype: 1 << 40),
            config.patch(fx_graph_cache=False),
            patch.object(post_grad, "is_gpu", lambda kind: True),  # which decides how sums fuse
        ):
            torch.compile(function, fullgraph=True)(*arguments)
        _inductor_costs[key] = metrics.num_bytes_accessed, metrics.generated_kernel_count
    return _inductor_costs[key]


def _on_cpu(value: Any) -> Any:
    """Replace tensors without data by zeros."""
    if isinstance(value, Tensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    if isinstance(value, Mapping):
        return {name: _on_cpu(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_on_cpu(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        changes = {field.name: _on_cpu(getattr(value, field.name)) for field in fields(value)}
        return replace(value, **changes)
    return value


def make_model(shape: Shape) -> nn.Module:
    """Make a Llama model of these sizes on the meta device, in bfloat16."""
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        num_hidden_layers=shape.num_layers,
    )
    with torch.device("meta"):
        model: nn.Module = LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


def _make_step(
    case: str, model: nn.Module, setting: StepSetting, lora_rank: int
) -> Callable[[], object]:
    tokens = torch.zeros(setting.rows, setting.length, dtype=torch.long, device="meta")
    if case in PEFT_COUNTED:
        return _peft_step(case, model, tokens, lora_rank)
    if case == BASE_FORWARD:
        decoder: Any = model.model
        return torch.no_grad()(partial(decoder, input_ids=tokens, use_cache=False))
    config = adapter_config(case, setting)
    if not hasattr(config, "num_experts"):
        config = adapter_config(case, replace(setting, rank=lora_rank))
    host = Host(model)
    host.add("counted", config)

    def step() -> None:
        out = host.hidden(tokens, adapters=["counted"] * len(tokens), training=True)
        loss = out.last_hidden_state.sum()
        added = host.adapters["counted"].config.auxiliary_loss(out.routing.get("counted", []))
        (loss if added is None else loss + added).backward()

    return step


def _peft_step(case: str, model: nn.Module, tokens: Tensor, rank: int) -> Callable[[], object]:
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    wrapped: Any = peft.get_peft_model(
        model,
        config,
        autocast_adapter_dtype=not case.endswith("bf16"),
    ).train()
    decoder = wrapped.base_model.model.model

    def step() -> None:
        decoder(input_ids=tokens, use_cache=False).last_hidden_state.sum().backward()

    return step


@contextmanager
def without_reads() -> Iterator[None]:
    """Let transformers' masks be made on the meta device."""
    with (
        patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None),
        patch.object(masking_utils, "fast_all", lambda mask: False),
    ):
        yield


class _Counter(TorchDispatchMode):
    """Sees every operation below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self._operations = self._bytes = self._flops = 0.0
        self._live = self._peak = 0.0
        self._known: set[int] = set()
        self._is_fused = False
        self._seconds = dict.fromkeys(CARDS, 0.0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        """Run an operation and count it."""
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        self._note_alive(inputs, counts=False)  # the weights: what was made here is known
        output = function(*args, **kwargs)
        if self._is_fused:
            formula = flop_registry.get(function._overloadpacket)
            if formula is not None:  # a product, which stays an operation of its own
                self._flops += formula(*args, **kwargs, out_val=output)
                self._operations += 1.0
            return output
        results = _tensors(output)
        self._note_alive(results)
        if not function.is_view and not function._schema.name.startswith("aten::empty"):
            self._add(function, args, kwargs, output, [*inputs, *results])
        return output

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Count a function as TorchInductor compiles it."""

        def call(*arguments: Any) -> Any:
            flops = self._flops
            self._is_fused = True
            output = function(*arguments)
            self._is_fused = False
            self._note_alive(_tensors(output))
            with _disable_current_modes():
                moved, num_kernels = inductor_cost(function, arguments)
            self._operations += num_kernels
            self._bytes += moved
            for name, card in CARDS.items():
                needed = (self._flops - flops) / card.flops
                self._seconds[name] += max(moved / card.bandwidth, needed)
            return output

        return call

    def count(self) -> Count:
        """Return what was counted."""
        return Count(self._operations, self._bytes, self._flops, self._peak, self._seconds)

    def _add(
        self, function: Any, args: Any, kwargs: Any, output: Any, tensors: list[Tensor]
    ) -> None:
        formula = flop_registry.get(function._overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=output)
        moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        self._operations += 1.0
        self._bytes += moved
        self._flops += flops
        for name, card in CARDS.items():
            self._seconds[name] += max(moved / card.bandwidth, flops / card.flops)

    def _note_alive(self, tensors: list[Tensor], *, counts: bool = True) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes() if counts else 0
            if key in self._known:
                continue
            self._known.add(key)
            self._live += size
            self._peak = max(self._peak, self._live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


if __name__ == "__main__":
    main()
