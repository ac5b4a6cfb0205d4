"""Thin wrappers in front of a base model's decoder layers, attention projections and FFN blocks.

Axes: B batch, L sequence, T tokens of a segment, D hidden, F feed-forward, O out_features.

The base modules stay the ones that transformers made: an attention projection gets a forward hook,
an FFN block and a decoder layer an instance `forward`. All step aside when no adapter wants them,
and `Wiring` takes them off again. Under autocast the base computes in its dtype; adapters choose
theirs: that of the base's outputs for low-rank products, float32 for routers and losses.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from logging import ERROR, getLogger
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from loraloom.base.blocks import Block, QuantizedWeight
from loraloom.base.quantization import is_linear
from loraloom.base.structure import Structure
from loraloom.errors import ModelError
from loraloom.host.experts_block import ExpertsBlock
from loraloom.host.extra_modules import own_outputs
from loraloom.host.forward import ForwardContext, current_forward, running
from loraloom.host.layout import Layout, Segment
from loraloom.host.prepared_weights import ProjectionSite, outside_autocast
from loraloom.host.stacked_forward import cut_rows, join_rows
from loraloom.ops.dropout import Site
from loraloom.ops.expert_ffn import FfnRows
from loraloom.ops.low_rank import add_low_rank_, apply_update


class DecoderLayer:
    """A decoder layer's forward: recomputed in the backward pass where the context says so."""

    def __init__(self, owner: object, module: nn.Module):
        self.owner = owner
        self.base_forward = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = current_forward(self.owner)
        if forward is None or not forward.checkpointing or not torch.is_grad_enabled():
            return self.base_forward(*args, **kwargs)
        # Adapters' random numbers depend on no generator's state.
        options = {"use_reentrant": False, "preserve_rng_state": False}
        return checkpoint(self._run, forward, *args, **options, **kwargs)  # ty: ignore[invalid-argument-type]

    def _run(self, forward: ForwardContext, *args: Any, **kwargs: Any) -> Any:
        # In the backward pass, maybe in another thread, the forward is over.
        is_first = current_forward(self.owner) is forward
        with nullcontext() if is_first else running(forward.recomputing()):
            return self.base_forward(*args, **kwargs)


@dataclass(frozen=True)
class AttentionProjection:
    """A forward hook that adds every segment's update to the output of a projection or block."""

    owner: object
    site: ProjectionSite

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> Any:
        forward = current_forward(self.owner)
        if forward is None or not any(forward.adapters):
            return output
        if isinstance(output, tuple):  # of gpt_oss's block, which returns its router's scores too
            return self(module, args, output[0]), *output[1:]
        if torch.is_grad_enabled() and args[0].requires_grad and not output.requires_grad:
            raise ModelError(
                f"training requires gradients through {type(module).__name__}, which computes "
                "none; load a base model that is not quantized in this form"
            )
        if len(module._forward_hooks) > 1:  # others' hooks may need it as it is
            output = output.clone()
        layout = forward.layout.of_input(args[0])
        with outside_autocast(output):
            # A stacked plan is made for rows of the forward's tokens alone.
            if forward.stacked is not None and layout is forward.layout:
                return forward.stacked.project(self.site, args[0], output, module)
            return self._adapted(forward, layout, args[0], output)

    def _adapted(
        self, forward: ForwardContext, layout: Layout, hidden_states: Tensor, output: Tensor
    ) -> Tensor:
        updates = forward.updates(self.site, layout, hidden_states, output.dtype)
        adapted = [side for _, side in updates if side is not None]
        if not adapted:
            return output
        if layout.row_order is not None or any(side.row_scale is not None for side in adapted):
            rows = []
            for tokens, (rank_input, side) in zip(layout.split(output), updates, strict=True):
                rows.append(apply_update(tokens, rank_input, side))
            return layout.join(rows, output.shape)
        # Rows come grouped by adapter, and none is scaled: updates are added in place.
        spans = []
        low_ranks = []
        up_projections = []
        for segment, (rank_input, side) in zip(layout.segments, updates, strict=True):
            if rank_input is not None and side is not None:
                spans.append(segment.tokens)
                low_ranks.append(rank_input)
                up_projections.append(side.B)
        return add_low_rank_(output, spans, low_ranks, up_projections)


class FfnBlock:
    """An FFN block's forward: the base's projections once for all rows, adapters in between."""

    def __init__(self, owner: object, block: Block, module: nn.Module):
        self.owner = owner
        self.block = block
        self.base_forward = module.forward
        inputs, (output,) = block.groups
        self.inputs = [module.get_submodule(name) for name in inputs]
        self.output = module.get_submodule(output)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        forward = current_forward(self.owner)
        if forward is None or not any(adapter.adapts(self.block) for adapter in forward.adapters):
            return self.base_forward(hidden_states)
        shape = hidden_states.shape
        hidden_states = forward.layout.by_row(hidden_states)  # a mixture flattens its input
        if forward.stacked is not None:
            down = partial(_outputs, self.output)
            output = forward.stacked.ffn(self.block, hidden_states, self._base_outputs, down)
            return output.view(shape)
        outputs = self._base_outputs(hidden_states)
        dtype = outputs[0].dtype
        layout = forward.layout
        rows_of_inputs = layout.split(hidden_states)
        rows_of_outputs = zip(*(layout.split(output) for output in outputs), strict=True)
        with outside_autocast(outputs[0]):
            segments = zip(layout.segments, rows_of_inputs, rows_of_outputs, strict=True)
            parts = [self._segment(forward, *segment) for segment in segments]
        hidden = [ffn_rows.hidden for ffn_rows in parts]
        sizes = [len(rows) for rows in hidden]
        output = _outputs(self.output, join_rows(hidden))
        output = output.to(dtype)  # int8's may have autocast's
        # A view of rows can't be added to in place where there are several.
        base_rows = cut_rows(output, sizes)
        with outside_autocast(output):
            finished = []
            for ffn_rows, rows in zip(parts, base_rows, strict=True):
                finished.append(ffn_rows.finish(rows))
        return layout.join(finished, hidden_states.shape).view(shape)

    def _base_outputs(self, hidden_states: Tensor) -> list[Tensor]:
        return [_outputs(linear, hidden_states) for linear in self.inputs]

    def _segment(
        self,
        forward: ForwardContext,
        segment: Segment,
        hidden_states: Tensor,
        outputs: Sequence[Tensor],
    ) -> FfnRows:
        block = self.block
        row = segment.row
        if row is None or not row[0].adapts(block):
            return FfnRows(block.gating(*outputs), lambda output: output)
        adapter, _ = row
        first = outputs[0]
        tokens = forward.tokens(segment, block.layer, first.device)
        weights = forward.forms.ffn(row, block, first.dtype)
        return adapter.ffn(block, weights, hidden_states, outputs, tokens)


def _site(block: Block, group: tuple[str, ...]) -> Site | str:
    """Where a group's random numbers are drawn."""
    if block.output.has_weight:
        if group == block.groups[0]:
            return Site.ATTENTION_INPUT
        if group == block.groups[-1]:
            return Site.ATTENTION_OUTPUT
    return f"{block.path}.{group[0]}"


def _outputs(linear: nn.Module, inputs: Tensor) -> Tensor:
    """Compute a base linear's outputs, to write to: hooks, or their graphs, may need theirs."""
    outputs = linear(inputs)
    if linear._forward_hooks:
        return outputs.clone()
    return outputs


class OwnedModule:
    """The forward of an embedding, norm or head that some adapters have as their own."""

    def __init__(self, owner: object, path: str, module: nn.Module):
        self.owner = owner
        self.path = path
        self.module = module
        self.base_forward = module.forward

    def __call__(self, inputs: Tensor) -> Tensor:
        forward = current_forward(self.owner)
        if forward is None:
            return self.base_forward(inputs)
        if all(adapter.own_at(self.path) is None for adapter in forward.adapters):
            return self.base_forward(inputs)
        layout = forward.layout
        parts = []
        dtype = next(self.module.parameters(recurse=False)).dtype
        for segment, rows in zip(layout.segments, layout.split_rows(inputs), strict=True):
            adapter, scale = segment.row or (None, 1.0)
            copy = None
            if adapter is not None:
                copy = adapter.own_at(self.path)
            if copy is None:
                outputs = self.base_forward(rows)
            else:
                weights = forward.forms.own(copy, dtype)
                outputs = own_outputs(copy, weights, self.module, rows, scale)
            parts.append(outputs)
        return layout.join(parts)


class QuantizedLinear:
    """A quantized layer's forward; for the backward pass it keeps nothing but the layer."""

    # As they come, LLM.int8 keeps its inputs, and torchao a dequantized copy of every weight.

    def __init__(self, weight: QuantizedWeight):
        self.weight = weight
        self.base_forward = weight.linear.forward

    def __call__(self, hidden_states: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return self.base_forward(hidden_states)
        if hidden_states.requires_grad:
            return _ThroughWeight.apply(hidden_states, self)
        return self.output(hidden_states)

    def output(self, hidden_states: Tensor) -> Tensor:
        # LLM.int8 sets outliers in float16 to zero and back, which autograd would take for another
        # input than others have kept; `data` has a version of its own. The output must be no view,
        # as updates may change it in place, which autograd refuses of views made in functions.
        output = self.base_forward(hidden_states.data)
        return torch.ops.aten._unsafe_view(output, output.shape)


class _ThroughWeight(torch.autograd.Function):
    """y = layer(x) and ∂x = ∂y W, W being dequantized anew."""

    @staticmethod
    def forward(ctx, hidden_states, layer):
        ctx.weight = layer.weight
        return layer.output(hidden_states)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad @ ctx.weight.dequantized().to(grad.dtype), None


class Wiring:
    """What a host changes on its base model, and how that is undone."""

    def __init__(self, model: Any, structure: Structure):
        modules = model.get_submodule(structure.info.layers_path).children()
        if any(isinstance(m.__dict__.get("forward"), DecoderLayer) for m in model.modules()):
            raise ModelError("the model is already attached; call detach() on its host first")
        devices = sorted({str(parameter.device) for parameter in model.parameters()})
        if len(devices) > 1:  # adapters and rows are where the embeddings are
            raise ModelError(
                f"model must be on one device, got parts on {', '.join(devices)}; load the model "
                "on one device (device_map={'': 0} for example), quantized if necessary"
            )
        self._model = model
        self._blocks: dict[nn.Module, FfnBlock | ExpertsBlock] = {}
        self.undo = ExitStack()
        for module in model.modules():
            self.undo.callback(setattr, module, "training", module.training)
        for parameter in model.parameters():
            self.undo.callback(parameter.requires_grad_, parameter.requires_grad)
        model.eval()
        model.requires_grad_(False)
        for weight in structure.quantized:
            self._keep_layout(weight.linear)
            if is_linear(weight.linear):
                self._replace_forward(weight.linear, QuantizedLinear(weight))
        for layer, module in zip(structure.layers, modules, strict=True):
            for block in layer.blocks:
                self._wire(block, module.get_submodule(block.path))
            self._replace_forward(module, DecoderLayer(self, module))
        head = model.get_output_embeddings()
        self.undo.callback(head.register_forward_pre_hook(_contiguous_input).remove)

    def _keep_layout(self, linear: Any) -> None:
        """Keep bitsandbytes from packing a 4-bit layer anew, and from a warning in each forward."""
        # On CPUs with AVX512-BF16 it does so before the first forward without gradients. The packed
        # form has no backward pass, rounds scales to 16 bits, and takes multiples of 32 rows only.
        getLogger("bitsandbytes.autograd._functions").setLevel(ERROR)
        if not hasattr(linear, "support_avx512bf16_for_cpu"):
            return
        before = linear.support_avx512bf16_for_cpu
        self.undo.callback(setattr, linear, "support_avx512bf16_for_cpu", before)
        linear.support_avx512bf16_for_cpu = False
        if getattr(linear.weight.quant_state, "packing_format_for_cpu", False):
            linear.state_dict()  # unpacks the layer

    def _wire(self, block: Block, module: nn.Module) -> None:
        if block.gating is not None:
            wrapper = FfnBlock if block.is_dense else ExpertsBlock
            self._blocks[module] = wrapper(self, block, module)
            self._replace_forward(module, self._blocks[module])
            return
        for group in block.groups:
            for name in group:
                site = ProjectionSite(block, group, name, _site(block, group))
                hook = AttentionProjection(self, site)
                handle = block.projections[name].linear.register_forward_hook(hook)
                self.undo.callback(handle.remove)

    def check_blocks(self) -> None:
        """Raise a ModelError if others took an FFN block's forward, as Liger kernels do."""
        for block, wrapper in self._blocks.items():
            if vars(block).get("forward") is not wrapper:
                raise ModelError(
                    "FFN blocks must keep the forward that adapters need, but another program "
                    "replaced it; train with use_liger_kernel=False, or patch the model before it "
                    "is attached"
                )

    def lead_through(self, path: str) -> None:
        """Let adapters that have a module of their own in place of one compute their rows."""
        module = self._model.get_submodule(path)
        if not isinstance(module.__dict__.get("forward"), OwnedModule):
            self._replace_forward(module, OwnedModule(self, path, module))

    def _replace_forward(self, module: nn.Module, wrapper: Callable[..., Any]) -> None:
        attributes = vars(module)
        if "forward" in attributes:
            self.undo.callback(setattr, module, "forward", module.forward)
        module.forward = wrapper
        self.undo.callback(attributes.pop, "forward")  # which is done first


def _contiguous_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    # Of a slice, as the last states of prompts are, torch.matmul multiplies strided rows batch by
    # batch (550 in place of 2.4 ms on two CPU cores for 16 prompts and 49,152 tokens).
    return (args[0].contiguous(), *args[1:])
