"""Low-rank updates of a linear layer, for one adapter's tokens.

Axes: T tokens, I in_features, O out_features, E experts, R rank, S = E·R. The compute form of E
experts is one LoRA of rank S: `A` stacks their down-projections, `B` their scaled up-projections,
and a mask between the two keeps a token's own expert. A plain LoRA is E = 1 without a mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loraloom.ops.dropout import DrawMask, apply_keep_mask, draw_mask

# From a projection's A product [T, P], its input [T, I] and the tokens' description to [T, S].
Between = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class UpProjection:
    """The B side of a projection, in compute form and dtype."""

    columns: slice  # of the A product, which projections with one input share
    B: Tensor  # up-projections times scaling, transposed, [S, O]
    row_scale: Tensor | None = None  # DoRA's factor c, [E, O] float32
    bias: Tensor | None = None  # the base's, which DoRA leaves unscaled
    between: Between | None = None

    def rank_input(self, low_rank: Tensor, hidden_states: Tensor, tokens: Any) -> Tensor:
        """Return what B multiplies, from the product with all A of a group."""
        low_rank = low_rank[:, self.columns]
        if self.between is None:
            return low_rank
        return self.between(low_rank, hidden_states, tokens)

    def scaled(self, scale: float) -> UpProjection:
        lora_B, row_scale = scale_update(self.B, self.row_scale, scale)
        return replace(self, B=lora_B, row_scale=row_scale)


@dataclass(frozen=True)
class InputGroup:
    """Projections with one input: their A stacked, [P, I], and the B side of each by name."""

    A: Tensor
    projections: dict[str, UpProjection]

    def rank_inputs(self, low_rank: Tensor, hidden_states: Tensor, tokens: Any) -> Tensor:
        rank_inputs = [
            side.rank_input(low_rank, hidden_states, tokens) for side in self.projections.values()
        ]
        return torch.cat(rank_inputs, dim=1)

    def scaled(self, scale: float) -> InputGroup:
        if scale == 1:
            return self
        sides = {name: side.scaled(scale) for name, side in self.projections.items()}
        return InputGroup(self.A, sides)


def add_product_over_tokens_(
    total: Float[Tensor, "S O"], left: Float[Tensor, "T S"], right: Float[Tensor, "T O"]
) -> None:
    """Add `left.T @ right` to `total`, which may have a wider dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
    else:
        total.add_(left.T @ right)


class _DownProject(torch.autograd.Function):
    """`dropout(x) @ A.T`, keeping x, and drawing the mask again for the backward pass."""

    @staticmethod
    def forward(ctx, hidden_states, lora_A, keep, dropout):
        ctx.save_for_backward(hidden_states, lora_A)
        ctx.keep = keep
        ctx.dropout = dropout
        low_rank = apply_keep_mask(hidden_states, draw_mask(keep)) @ lora_A.T
        if keep is None:
            return low_rank
        return low_rank * (1 / (1 - dropout))

    @staticmethod
    def backward(ctx, grad):  # ty: ignore[incompatible-method-override]
        hidden_states, lora_A = ctx.saved_tensors
        keep = draw_mask(ctx.keep)
        if keep is not None:
            grad = grad * (1 / (1 - ctx.dropout))
        grad_hidden = grad_A = None
        if ctx.needs_input_grad[0]:
            grad_hidden = apply_keep_mask(grad @ lora_A, keep)
        if ctx.needs_input_grad[1]:
            grad_A = grad.T @ apply_keep_mask(hidden_states, keep)
        return grad_hidden, grad_A, None, None


def down_project(
    hidden_states: Float[Tensor, "T I"],
    lora_A: Float[Tensor, "S I"],
    keep: DrawMask | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "T S"]:
    """Compute `(hidden_states * keep / (1 - dropout)) @ lora_A.T`; `keep` draws a mask, [T, I]."""
    return _DownProject.apply(hidden_states, lora_A, keep, dropout)


class _AddLowRank(torch.autograd.Function):
    """`output[span] += low_rank @ B` in place, for several spans of rows at once."""

    @staticmethod
    def forward(ctx, output, spans, *factors):  # of all spans, low_rank first, then lora_B
        rows = output.view(-1, output.shape[-1])
        low_ranks = factors[: len(spans)]
        up_projections = factors[len(spans) :]
        for span, low_rank, lora_B in zip(spans, low_ranks, up_projections, strict=True):
            rows[span].addmm_(low_rank, lora_B)
        ctx.mark_dirty(output)
        ctx.save_for_backward(*factors)
        ctx.spans = spans
        return output

    @staticmethod
    def backward(ctx, grad):  # ty: ignore[incompatible-method-override]
        rows = grad.reshape(-1, grad.shape[-1])
        factors = ctx.saved_tensors  # read once, which is all that checkpointing allows
        num_spans = len(ctx.spans)
        low_ranks = factors[:num_spans]
        up_projections = factors[num_spans:]
        grads_low_rank = []
        grads_B = []
        for span, low_rank, lora_B in zip(ctx.spans, low_ranks, up_projections, strict=True):
            grad_rows = rows[span]
            grads_low_rank.append(grad_rows @ lora_B.T)
            grads_B.append(low_rank.T @ grad_rows)
        return grad, None, *grads_low_rank, *grads_B


def add_low_rank_(
    output: Float[Tensor, "*batch O"],
    spans: list[slice],
    low_rank: list[Tensor],
    lora_B: list[Tensor],
) -> Float[Tensor, "*batch O"]:
    """Add `low_rank[i] @ lora_B[i]` to the token rows `spans[i]` of `output`, in place."""
    return _AddLowRank.apply(output, spans, *low_rank, *lora_B)


def decompose(
    output: Float[Tensor, "*rows O"],
    update: Float[Tensor, "*rows O"],
    row_scale: Float[Tensor, "*scales O"],
    bias: Float[Tensor, " O"] | None,
) -> Float[Tensor, "*rows O"]:
    """`c ∘ (Wx + Δ) + b` of `Wx + b` and Δ (Liu et al. 2024, DoRA, arXiv:2402.09353, eq. 5)."""
    excess = excess_of(row_scale, output.dtype)
    value, _ = scale_rows(output, update, excess, bias)
    return value


def apply_update(output: Tensor, rank_input: Tensor | None, side: UpProjection | None) -> Tensor:
    """Compute `output + rank_input @ B`, or DoRA's `c ∘ (Wx + Δ) + b`, of one expert."""
    if side is None or rank_input is None:
        return output
    if side.row_scale is None:
        return torch.addmm(output, rank_input, side.B)
    return decompose(output, rank_input @ side.B, side.row_scale, side.bias)


def excess_of(row_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute `c - 1`, which bfloat16 holds to three digits where it has no c near 1 but 1."""
    return (row_scale - 1).to(dtype)


def scale_rows(
    output: Tensor, update: Tensor, excess: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute `c ∘ (Wx + Δ) + b` as `(Wx + b) + (Δ + (c - 1) ∘ (Wx + Δ))`, and `Wx + Δ`."""
    # What changes the base's output is summed up first and rounded with it once. A factor near 1 is
    # lost if it multiplies numbers that are rounded already: they round to themselves.
    rows = output + update
    if bias is not None:
        rows -= bias
    change = torch.addcmul(update, excess, rows)
    return change.add_(output), rows


def decompose_rows(
    output: Tensor,
    rank_input: Tensor,
    lora_B: Tensor,
    excess: Tensor,
    bias: Tensor | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`c ∘ (Wx + Δ) + b` and `Wx + Δ`, for which `out` has room; that may be the output itself."""
    if output.dtype.itemsize <= 2:  # what is rounded so far can't be scaled by factors near 1
        update = rank_input @ lora_B
        value, rows = scale_rows(output, update, excess, bias)
        if out is None or out is output:
            return value, rows
        return value, out.copy_(rows)
    rows = torch.addmm(output, rank_input, lora_B, out=out)
    if bias is not None:
        rows -= bias
    value = torch.addcmul(rows, excess, rows)
    if bias is not None:
        value.add_(bias)
    return value, rows


def scale_update(
    lora_B: Float[Tensor, "S O"], row_scale: Float[Tensor, "E O"] | None, scale: float
) -> tuple[Float[Tensor, "S O"], Float[Tensor, "E O"] | None]:
    """Fold a factor λ of what an adapter adds into B, which becomes λB, or B and row scale."""
    # With one, the adapter adds (c - 1) ∘ Wx + c ∘ Δ; λ times that is what the row scale
    # c' = 1 + λ(c - 1) and the update Δ' = (λc / c') ∘ Δ add.
    if row_scale is None:
        return lora_B * scale, None
    factors = 1 + scale * (row_scale - 1)
    # Δ' is divided by c', which has a zero where λ isn't in [0, 1]: what is left out of Wx and what
    # rounding c' - 1 costs Δ are alike at √eps.
    least = torch.finfo(lora_B.dtype).eps ** 0.5
    factors = torch.where(factors.abs() < least, least, factors)
    rank = len(lora_B) // len(factors)
    update_scale = scale * row_scale / factors  # (E, O)
    scaled = lora_B * update_scale.repeat_interleave(rank, dim=0)
    return scaled.to(lora_B.dtype), factors


def dora_norms(
    cross: Float[Tensor, "*E O R"],
    squared_norms: Float[Tensor, "... O"],
    lora_A: Float[Tensor, "*E R I"],
    lora_B: Float[Tensor, "*E O R"],
    scaling: float,
) -> Float[Tensor, "*E O"]:
    """Compute the row norms of `W + s B_e A_e` for every expert without the dense product.

    ‖W + sBA‖² = ‖W‖² + 2s·rowsum((W Aᵀ)∘B) + s²·rowsum((B(AAᵀ))∘B), from `cross`, W A_eᵀ, and
    `squared_norms`, the frozen ‖W‖² by row.
    """
    gram = lora_A @ lora_A.mT  # (*E, R, R)
    factor = 2 * scaling * cross.to(lora_A.dtype) + scaling**2 * lora_B @ gram  # (*E, O, R)
    squared = squared_norms + (lora_B * factor).sum(-1)
    # Where an update cancels a row of W, rounding may leave less than nothing of it.
    return squared.clamp_min(0).sqrt()


def slot_masks(
    selected_experts: Int[Tensor, "T K"], num_experts: int, rank: int, dtype: torch.dtype
) -> Float[Tensor, "K T S"]:
    """Return for each slot 1 at the columns of its expert and 0 elsewhere; expert -1 has none."""
    experts = torch.arange(num_experts, device=selected_experts.device)
    is_selected = selected_experts.T[..., None] == experts  # (K, T, E)
    return is_selected.to(dtype).repeat_interleave(rank, dim=-1)
