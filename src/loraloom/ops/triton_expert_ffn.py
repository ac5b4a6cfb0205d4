"""The FFN block of one adapter's tokens on a GPU: slots, experts and activation in one kernel.

Axes: T tokens, D hidden, F feed-forward, K top_k, E experts, R rank, S = E·R, P columns of the
input product, N splits.

The same numbers as `expert_ffn.py`, whose `expert_ffn` is this file's semantics, and the same
tensors kept for the backward pass as in `lean_expert_ffn.py`. Where that file reads and writes
[T, F] some twenty times a slot, the kernels of `expert_ffn_kernels.py` read gate and up once and
write Σ_j g_j h_j once; see docs/kernels.md. Triton is imported when first used: it comes with
PyTorch for CUDA and is no dependency.

Numerics: products take operands in the dtype of `gate` and sum in float32; all between two
products, the sum over slots included, is float32 (float64 for float64). Equal inputs give equal
bits: nothing is atomic, and tiles follow from shapes alone, never from a timing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import activations

from loraloom.ops.expert_ffn import Activation, FfnDropout, FfnWeights, Routing, combine_slots
from loraloom.ops.low_rank import UpProjection, decompose, down_project, rows_of_experts, slot_masks

MAX_RANKS = 256
"""Greatest S: wider, the products with zeros cost more than the traffic that they save."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_PROGRAMS = 256  # enough for every multiprocessor of a large GPU
_FUNCTIONS = {functional.silu: "silu", functional.gelu: "gelu", functional.relu: "relu"}
_MODULES: dict[type[nn.Module], str] = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    activations.SiLUActivation: "silu",
    activations.GELUActivation: "gelu",
    activations.GELUTanh: "gelu_tanh",
    activations.NewGELUActivation: "gelu_tanh",
}


@dataclass(frozen=True)
class Tile:
    """What one program works on at a time: tokens × features, and the ranks of a product."""

    tokens: int
    features: int
    ranks: int
    num_warps: int


def fits_triton(gate: Tensor, weights: FfnWeights, act: Activation) -> bool:
    """Whether the kernels can run: tokens on a GPU with Triton, an activation and width they know.

    They have not run on a GPU yet: the environment variable LORALOOM_TRITON=1 asks for them.
    """
    return (
        gate.is_cuda
        and len(gate) > 0
        and gate.dtype in _DTYPES
        and weights.num_experts * weights.rank <= MAX_RANKS
        and activation_name(act) is not None
        and _has_triton(gate.device)
    )


@cache
def _has_triton(device: torch.device) -> bool:
    """Whether Triton is there, wanted, and the GPU one of NVIDIA's since Ampere."""
    if find_spec("triton") is None or os.environ.get("LORALOOM_TRITON") != "1":
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def activation_name(act: Activation) -> str | None:
    """Return the kernels' name of an activation, or None if they lack it."""
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return _MODULES.get(type(act)) if isinstance(act, nn.Module) else _FUNCTIONS.get(act)


def triton_expert_ffn(
    hidden_states: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weights: FfnWeights,
    routing: Routing | None,
    act: Activation,
    dropout: FfnDropout,
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Compute what `expert_ffn` computes; see there.

    Args:
        hidden_states: The block's input, [T, D].
        gate: Base output of the gate (or only) input projection, [T, F].
        up: Base output of up, [T, F], or None.
        weights: The adapter's weights; `fits_triton` says which fit.
        routing: Slots of each token; None for a plain LoRA (one expert with weight 1).
        act: The base's activation.
        dropout: Masks.

    Returns:
        Hidden rows ([T, F], or [K·T, F] where slots stay apart) and a function from the base's
        output for them to the block's output, [T, D].
    """
    experts = gate.new_zeros(1, len(gate), dtype=torch.long)
    if routing is not None:
        experts = routing.selected_experts.T  # (K, T)
    low_rank = None
    if weights.input_A is not None:
        keep, probability = dropout.keep_input, dropout.probability
        low_rank = down_project(hidden_states, weights.input_A, keep, probability)
    block = _Block(weights.num_experts, weights.rank, weights.apart, str(activation_name(act)))
    slot_weights = None
    if routing is not None and not weights.apart:
        slot_weights = routing.routing_weights.to(_wide(gate.dtype))
    hidden, down_rank = _TritonFfn.apply(  # pyright: ignore[reportGeneralTypeIssues]
        block,
        gate,
        up,
        *_side(weights.gate, low_rank),
        *_side(weights.up, low_rank),
        None if weights.down is None else weights.down.A,
        None if slot_weights is None else slot_weights.T,  # (K, T)
        experts.to(torch.int32).contiguous(),
        *(() if weights.down is None else dropout.keep_slots),
    )
    if weights.down is not None:
        down_rank = down_rank * dropout.scale if dropout.probability else down_rank
        down_rank = _weighted(down_rank, block, routing, slot_weights).to(gate.dtype)
    if weights.apart:
        return hidden, lambda output: _finish_apart(output, down_rank, weights, routing, experts)
    if weights.down is None:
        return hidden, lambda output: output
    down_B = weights.down.B
    return hidden, lambda output: torch.addmm(output, down_rank, down_B)


def _finish_apart(
    output: Tensor, down_rank: Tensor, weights: FfnWeights, routing: Routing | None, experts: Tensor
) -> Tensor:
    """Adapt the base's output for each slot's rows, [K·T, D], and add the slots up."""
    slots = list(output.chunk(len(experts)))
    down = weights.down
    if down is not None:
        masks = slot_masks(experts.T, weights.num_experts, weights.rank, down_rank.dtype)
        updates = [(down_rank * mask) @ down.B for mask in masks]
        if down.row_scale is None:
            slots = [rows + update for rows, update in zip(slots, updates, strict=True)]
        else:
            ones = torch.ones_like(down.row_scale[:1])  # for expert -1, padding
            scales = rows_of_experts(torch.cat([down.row_scale, ones]), experts)
            slots = [
                decompose(*rows, weights.down_bias)
                for rows in zip(slots, updates, scales, strict=True)
            ]
    if routing is None:
        return slots[0]
    return combine_slots(slots, routing.routing_weights.to(output.dtype).T.unsqueeze(-1))


def _side(
    side: UpProjection | None, low_rank: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return a projection's rank-space input, B, and with DoRA its row scale and bias."""
    if side is None or low_rank is None:
        return None, None, None, None
    bias = None if side.row_scale is None else side.bias
    return low_rank[:, side.columns], side.B, side.row_scale, bias


def _weighted(
    down_rank: Tensor, block: _Block, routing: Routing | None, slot_weights: Tensor | None
) -> Tensor:
    """Weigh the columns of a token's experts, which are another slot's each, by g."""
    if routing is None or slot_weights is None:
        return down_rank
    experts = routing.selected_experts.remainder(block.num_experts + 1)  # -1 is one more
    weights = slot_weights.new_zeros(len(down_rank), block.num_experts + 1)
    weights = weights.scatter(1, experts, slot_weights)[:, :-1]  # (T, E)
    return down_rank * weights.repeat_interleave(block.rank, dim=1)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _dense(tensor: Tensor | None) -> Tensor | None:
    """Make rows contiguous in their last axis, as the kernels read them."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _per_split(length: int, tile: int, programs: int) -> int:
    """Cut an axis so that its parts times `programs` fill a GPU; parts are whole tiles."""
    tiles = -(-length // tile)
    splits = min(tiles, -(-_PROGRAMS // programs))
    return -(-tiles // splits) * tile


def _power_of_two(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def _padded(size: int) -> int:
    """The next power of two from 16 on, which a product's axes must be."""
    return max(16, _power_of_two(size))


@dataclass(frozen=True)
class _Block:
    """What the function needs besides tensors."""

    num_experts: int
    rank: int
    apart: bool
    act: str

    @property
    def size(self) -> int:
        """S."""
        return self.num_experts * self.rank


class _Launch:
    """What the three kernels are given alike."""

    def __init__(self, block: _Block, tensors: Sequence[Tensor | None], keeps: Sequence[Any]):
        gate, up, gate_rank, gate_B, gate_c, gate_bias, up_rank, up_B, up_c, up_bias = (
            _dense(tensor) for tensor in tensors[:10]
        )
        down_A, weights, experts = (_dense(tensor) for tensor in tensors[10:13])
        self.block = block
        self.gate: Any = gate
        self.num_slots = len(experts)  # pyright: ignore[reportArgumentType]
        self.num_tokens, self.num_features = self.gate.shape
        self.wide = _wide(self.gate.dtype)
        masks = tuple(keep.contiguous() for keep in keeps if keep is not None)
        self.tensors = {
            **_rows("gate", gate), **_rows("up", up),
            **_rows("gate_rank", gate_rank), **_rows("up_rank", up_rank),
            **_rows("gate_B", gate_B), **_rows("up_B", up_B),
            "gate_scale": _whole(gate_c), "up_scale": _whole(up_c),
            "gate_bias": gate_bias, "up_bias": up_bias,
            **_rows("down_A", down_A),
            "keeps": masks or None, "experts": experts, "weights": _whole(weights),
        }  # fmt: skip

    def run(self, kernel: Any, programs: tuple[int, int], tile: Tile, **arguments: Any) -> None:
        """Start a kernel on the tensors' device."""
        with torch.cuda.device_of(self.gate):
            kernel[programs](
                **self.tensors,
                **arguments,
                num_tokens=self.num_tokens,
                num_features=self.num_features,
                SIZE=self.block.size,
                RANK=self.block.rank,
                TOP_K=self.num_slots,
                APART=self.block.apart,
                ACT=self.block.act,
                DTYPE=_triton_dtype(self.wide),
                PRECISION=_precision(),
                BLOCK_T=tile.tokens,
                BLOCK_F=tile.features,
                BLOCK_S=min(tile.ranks, _padded(self.block.size)),
                PADDED_S=_padded(self.block.size),
                num_warps=tile.num_warps,
                enable_fp_fusion=True,
            )

    def room(self, *shape: int) -> Tensor:
        """Make room for results in float32 or better."""
        return self.gate.new_empty(shape, dtype=self.wide)


def _rows(name: str, tensor: Tensor | None) -> dict[str, Any]:
    return {name: tensor, f"{name}_stride": _stride(tensor)}


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _precision() -> str:
    """How float32 operands are multiplied: as PyTorch's own products are."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


class _TritonFfn(torch.autograd.Function):
    """(gate, up, rank-space inputs) -> (Σ_j g_j h_j, unweighted rank-space input of down)."""

    @staticmethod
    def forward(ctx, block, *tensors):
        ctx.block = block
        ctx.save_for_backward(*tensors)
        launch = _Launch(block, tensors[:13], tensors[13:])
        from loraloom.ops import expert_ffn_kernels as kernels

        tile = tiles(block.size).forward
        tokens, features = launch.num_tokens, launch.num_features
        rows = -(-tokens // tile.tokens)
        per_split = _per_split(features, tile.features, rows)
        splits = -(-features // per_split)
        hidden = launch.gate.new_empty(
            launch.num_slots * tokens if block.apart else tokens, features
        )
        down_rank = launch.room(splits, tokens, block.size if tensors[10] is not None else 0)
        launch.run(
            kernels.forward_kernel, (rows, splits), tile,
            hidden=hidden, down_rank=down_rank, features_per_split=per_split,
        )  # fmt: skip
        return hidden, _total(down_rank)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_hidden, grad_down):  # pyright: ignore
        backward = _Backward(ctx.block, ctx.saved_tensors, grad_hidden, grad_down)
        return None, *backward.gradients(), *(None for _ in ctx.saved_tensors[12:])


class _Backward:
    """The gradients of the function's tensors, from two kernels."""

    def __init__(
        self, block: _Block, tensors: Sequence[Any], grad_hidden: Tensor, grad_down: Tensor
    ):
        self.launch = _Launch(block, tensors[:13], tensors[13:])
        self.tensors = tensors
        grad_hidden = grad_hidden if grad_hidden.stride(-1) == 1 else grad_hidden.contiguous()
        self.upstream = {
            **_rows("grad_hidden", grad_hidden),
            "grad_rank": grad_down.to(self.launch.gate.dtype).contiguous(),
        }
        self.tiles = tiles(block.size)

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Return them in the order of the function's tensors, biases without any."""
        gate, up, gate_rank, up_rank, weights = self._over_features()
        gate_B, up_B, down_A, gate_c, up_c = self._over_tokens()
        return (
            gate, up, gate_rank, gate_B, gate_c, None, up_rank, up_B, up_c, None, down_A, weights,
        )  # fmt: skip

    def _over_features(self) -> tuple[Any, ...]:
        """Gradients of gate and up, of their rank-space inputs and of the routing weights."""
        from loraloom.ops import expert_ffn_kernels as kernels

        launch, tile = self.launch, self.tiles.token
        rows = -(-launch.num_tokens // tile.tokens)
        per_split = _per_split(launch.num_features, tile.features, rows)
        splits = -(-launch.num_features // per_split)
        grad_gate = self._like("gate")
        grad_up = self._like("up")
        room = lambda name, width: self._room(name, splits, launch.num_tokens, width)  # noqa: E731
        gate_rank = room("gate_B", launch.block.size)
        up_rank = room("up_B", launch.block.size)
        weights = room("weights", launch.num_slots)
        launch.run(
            kernels.token_kernel, (rows, splits), tile, **self.upstream,
            grad_gate=grad_gate, grad_up=grad_up,
            grad_gate_rank=gate_rank, grad_up_rank=up_rank, grad_weights=weights,
            features_per_split=per_split, PADDED_K=_power_of_two(launch.num_slots),
        )  # fmt: skip
        weights = _total(weights)
        return (
            grad_gate, grad_up, _total(gate_rank), _total(up_rank),
            None if weights is None else weights.T,
        )  # fmt: skip

    def _over_tokens(self) -> tuple[Any, ...]:
        """Gradients of gate's and up's B, of down's A, and of DoRA's row scales."""
        from loraloom.ops import expert_ffn_kernels as kernels

        launch, tile = self.launch, self.tiles.feature
        columns = -(-launch.num_features // tile.features)
        per_split = _per_split(launch.num_tokens, tile.tokens, columns)
        splits = -(-launch.num_tokens // per_split)
        size, experts = launch.block.size, launch.block.num_experts
        rows = {"gate_B": size, "up_B": size, "down_A": size}
        rows |= {"gate_scale": experts, "up_scale": experts}
        grads = {
            f"grad_{name}": self._room(name, splits, count, launch.num_features)
            for name, count in rows.items()
        }
        launch.run(
            kernels.feature_kernel, (columns, splits), tile, **self.upstream, **grads,
            tokens_per_split=per_split, EXPERTS=experts, PADDED_E=_padded(experts),
        )  # fmt: skip
        return tuple(_total(grad) for grad in grads.values())

    def _like(self, name: str) -> Tensor | None:
        tensor = self.launch.tensors[name]
        return None if tensor is None else tensor.new_empty(tensor.shape)

    def _room(self, name: str, *shape: int) -> Tensor | None:
        """Make room for a sum that belongs to a tensor, where there is one."""
        return None if self.launch.tensors[name] is None else self.launch.room(*shape)


def _total(parts: Any) -> Any:
    """Add up what the splits wrote."""
    if parts is None:
        return None
    return parts[0] if len(parts) == 1 else parts.sum(0)


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels."""

    forward: Tile
    token: Tile
    feature: Tile


def tiles(size: int) -> Tiles:
    """Choose tiles by S: as many tokens as registers hold, since each tile reads all weights."""
    if _padded(size) <= 128:
        return Tiles(Tile(64, 32, 64, 8), Tile(64, 32, 64, 8), Tile(64, 32, 64, 8))
    return Tiles(Tile(64, 32, 64, 8), Tile(32, 32, 64, 8), Tile(32, 32, 64, 8))
