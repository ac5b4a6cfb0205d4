"""Triton kernels of an FFN block's hidden states; `expert_ffn.py` starts them and names the axes.

A program computes a tile of rows and columns, slot after slot, in float32. What B or A multiply in
rank space is read masked to the expert of each row, so that nothing is gathered or sorted. Sums
over columns are written for each tile and added up later: the same sum in every run.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _silu(x):
    share = 1 / (1 + tl.exp(-x))
    return x * share, share * (1 + x * (1 - share))


@triton.jit
def _product(
    total, values, values_row, start, weight, weight_row, weight_col,
    expert, rows, rows_exist, cols, cols_exist, rank, num_columns, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Add rank-space rows times a weight; columns of other experts than a row's are zero."""
    for first in range(0, num_columns, BLOCK_S):
        columns = first + tl.arange(0, BLOCK_S)
        own = (columns // rank)[None, :] == expert[:, None]
        left = tl.load(
            values + rows[:, None] * values_row + start + columns[None, :],
            mask=own & rows_exist[:, None],
            other=0.0,
        )
        right = tl.load(
            weight + columns[:, None] * weight_row + cols[None, :] * weight_col,
            mask=(columns < num_columns)[:, None] & cols_exist[None, :],
            other=0.0,
        )
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit
def _project(
    output, output_row, low_rank, low_rank_row, start, lora_B, B_row, B_col,
    expert, rows, rows_exist, cols, cols_exist, rank, num_columns, BLOCK_S: tl.constexpr,
):  # fmt: skip
    exist = rows_exist[:, None] & cols_exist[None, :]
    value = tl.load(output + rows[:, None] * output_row + cols[None, :], mask=exist, other=0.0)
    value = value.to(tl.float32)
    if lora_B is not None:
        value = _product(
            value, low_rank, low_rank_row, start, lora_B, B_row, B_col,
            expert, rows, rows_exist, cols, cols_exist, rank, num_columns, BLOCK_S,
        )  # fmt: skip
    return value


@triton.jit
def hidden_kernel(
    gate, gate_row, up, up_row, low_rank, low_rank_row, gate_start, up_start,
    gate_B, gate_B_row, gate_B_col, up_B, up_B_row, up_B_col,
    experts, experts_slot, experts_row, weights, weights_row, weights_slot, keep, keep_scale,
    grad_hidden, grad_rank, grad_rank_row, down_A, down_A_row, down_A_col,
    total, total_up, slots, slot_gate, slot_up, weight_sums,
    num_tokens, num_slots, num_cols, rank, num_columns,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Compute Σ_j g_j h_j, and drop(h_j) of each slot if `slots` is given; or go back through it.

    With `grad_hidden`, the totals are the gradients of gate and up; the formulas are those of
    `loraloom.ops.lean_expert_ffn._LeanFfn`.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    rows_exist, cols_exist = rows < num_tokens, cols < num_cols
    exist = rows_exist[:, None] & cols_exist[None, :]
    here = rows[:, None] * num_cols + cols[None, :]
    tile_total = tl.full((BLOCK_T, BLOCK_F), 0.0, tl.float32)
    tile_total_up = tl.full((BLOCK_T, BLOCK_F), 0.0, tl.float32)
    for slot in range(0, num_slots):
        expert = tl.where(rows_exist, 0, -1)
        if experts is not None:
            places = experts + slot * experts_slot + rows * experts_row
            expert = tl.load(places, mask=rows_exist, other=-1).to(tl.int32)
        # All slots' numbers are more than 32 bits count.
        wide_slot = tl.cast(slot, tl.int64)
        in_slot = here + wide_slot * num_tokens * num_cols
        inner = _project(
            gate, gate_row, low_rank, low_rank_row, gate_start, gate_B, gate_B_row, gate_B_col,
            expert, rows, rows_exist, cols, cols_exist, rank, num_columns, BLOCK_S,
        )  # fmt: skip
        activated, slope = _silu(inner)
        states = activated
        if up is not None:
            outer = _project(
                up, up_row, low_rank, low_rank_row, up_start, up_B, up_B_row, up_B_col,
                expert, rows, rows_exist, cols, cols_exist, rank, num_columns, BLOCK_S,
            )  # fmt: skip
            states = activated * outer
            slope *= outer
        weight, factor = 1.0, 1.0
        if keep is not None:
            factor = tl.load(keep + in_slot, mask=exist, other=0.0).to(tl.float32) * keep_scale
        if slots is not None:
            tl.store(slots + in_slot, states * factor, mask=exist)
        if weights is not None:
            places = weights + rows * weights_row + slot * weights_slot
            weight = tl.load(places, mask=rows_exist, other=0.0).to(tl.float32)[:, None]
        if grad_hidden is None:
            tile_total += states * weight
        else:
            upstream = tl.load(grad_hidden + here, mask=exist, other=0.0).to(tl.float32)
            if down_A is not None:
                first = upstream if keep is None else tl.zeros_like(upstream)
                through = _product(
                    first, grad_rank, grad_rank_row, 0, down_A, down_A_row, down_A_col,
                    expert, rows, rows_exist, cols, cols_exist, rank, num_columns, BLOCK_S,
                )  # fmt: skip
                upstream = through if keep is None else upstream + through * factor
            if weights is not None:
                # <∂y, h_j> + <∂z_d, drop(h_j) A_dᵀ>, as one product with h_j, of the tile's columns
                sums = weight_sums + (tl.program_id(1) * num_slots + wide_slot) * num_tokens + rows
                tl.store(sums, tl.sum(upstream * states, axis=1), mask=rows_exist)
                upstream *= weight
            grad = upstream * slope
            tile_total += grad
            if slot_gate is not None:
                tl.store(slot_gate + in_slot, grad, mask=exist)
            if up is not None:
                grad = upstream * activated
                tile_total_up += grad
                if slot_up is not None:
                    tl.store(slot_up + in_slot, grad, mask=exist)
    tl.store(total + here, tile_total, mask=exist)
    if total_up is not None:
        tl.store(total_up + here, tile_total_up, mask=exist)
