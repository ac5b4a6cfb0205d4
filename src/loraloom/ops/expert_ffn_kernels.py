"""Triton kernels of an FFN block's experts; `triton_expert_ffn.py` launches them.

Axes: T tokens, F feed-forward, K top_k, E experts, R rank, S = E·R; N splits.

A program owns a tile of tokens × features. A slot's update is one product over all experts' ranks,
in which a token's activations of other experts than the slot's are never loaded: they are zeros.
Sums over features (`forward_kernel`, `token_kernel`) stay in registers while a program walks
through features, sums over tokens (`feature_kernel`) while it walks through tokens; what several
programs add up, they write apart, to be summed afterwards. Nothing is atomic: results don't depend
on the order of programs.

What a kernel is given: `gate`, `up` the base's outputs, [T, F]; `gate_rank`, `up_rank` rank-space
activations of all experts, [T, S]; `gate_B`, `up_B`, `down_A`, [S, F]; `gate_scale`, `up_scale`
DoRA's c, [E, F], with the base's biases; `keeps` a dropout mask [T, F] a slot; `experts`,
`weights` [K, T]; `grad_hidden` like the forward pass's result and `grad_rank`, [T, S], the
gradients of its results. Those of what is not adapted or not there are None. Strides are those
of rows, in elements; rows are contiguous. Arithmetic is float32 (float64 for float64), operands
of products have the dtype of `gate`. This module imports triton, so nothing else may import it at
module level.

`no_type_check` keeps the tests' run-time type checks out of functions that Triton compiles.
"""

# pyright: basic, reportArgumentType=false, reportIndexIssue=false, reportOptionalMemberAccess=false
# pyright: reportAttributeAccessIssue=false, reportOptionalOperand=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
@no_type_check
def _activate(x, ACT: tl.constexpr):
    """Return act(x) and its derivative."""
    if ACT == "silu":
        gate = tl.sigmoid(x)
        value = x * gate
        slope = gate * (1 + x * (1 - gate))
    elif ACT == "gelu":
        normal = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value = x * normal
        slope = normal + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        bend = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        value = 0.5 * x * (1 + bend)
        inner = 0.7978845608028654 * (1 + 3 * 0.044715 * x * x)
        slope = 0.5 * (1 + bend) + 0.5 * x * (1 - bend * bend) * inner
    else:
        tl.static_assert(ACT == "relu")
        slope = tl.where(x > 0, 1.0, 0.0).to(x.dtype)
        value = tl.where(x > 0, x, 0.0).to(x.dtype)
    return value, slope


@triton.jit
@no_type_check
def _tile(pointer, stride, rows, columns, inside):
    """Load rows × columns of a matrix in its own dtype, zero outside."""
    return tl.load(
        pointer + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0
    )


@triton.jit
@no_type_check
def _own(experts, columns, SIZE: tl.constexpr, RANK: tl.constexpr):
    """Whether a column of S belongs to the token's expert, [t, s]; expert -1 has none."""
    return (columns[None, :] // RANK == experts[:, None]) & (columns[None, :] < SIZE)


@triton.jit
@no_type_check
def _own_transposed(experts, columns, SIZE: tl.constexpr, RANK: tl.constexpr):
    """The same, [s, t]."""
    return (columns[:, None] // RANK == experts[None, :]) & (columns[:, None] < SIZE)


@triton.jit
@no_type_check
def _add_product(
    total,
    rank_pointer,
    rank_stride,
    weight_pointer,
    weight_stride,
    tokens,
    features,
    experts,
    num_features,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add the slot's rank-space activations [t, S] times a weight [S, f] to total."""
    for start in range(0, SIZE, BLOCK_S):
        columns = start + tl.arange(0, BLOCK_S)
        own = _own(experts, columns, SIZE, RANK)
        activations = _tile(rank_pointer, rank_stride, tokens, columns, own)
        inside = (columns[:, None] < SIZE) & (features[None, :] < num_features)
        weight = _tile(weight_pointer, weight_stride, columns, features, inside)
        total = tl.dot(activations, weight, total, input_precision=PRECISION, out_dtype=total.dtype)
    return total


@triton.jit
@no_type_check
def _adapted(
    output,
    rank_pointer,
    rank_stride,
    B_pointer,
    B_stride,
    scale_pointer,
    bias_pointer,
    tokens,
    features,
    experts,
    num_features,
    SIZE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adapt a tile of a projection's base output.

    Returns:
        The value, what DoRA's row scale multiplies, and that scale (the value twice without DoRA).
    """
    update = output
    if B_pointer is not None:
        if bias_pointer is not None:
            bias = tl.load(bias_pointer + features, mask=features < num_features, other=0.0)
            update = output - bias[None, :].to(output.dtype)
        update = _add_product(
            update, rank_pointer, rank_stride, B_pointer, B_stride, tokens, features, experts,
            num_features, SIZE, RANK, BLOCK_S, PRECISION,
        )  # fmt: skip
    value = update
    scale = update
    if scale_pointer is not None:
        routed = (experts[:, None] >= 0) & (features[None, :] < num_features)
        rows = scale_pointer + experts[:, None].to(tl.int64) * num_features + features[None, :]
        scale = tl.load(rows, mask=routed, other=1.0).to(output.dtype)
        value = scale * update
        if bias_pointer is not None:
            value += bias[None, :].to(output.dtype)
    return value, update, scale


@triton.jit
@no_type_check
def _store_ranks(pointer, values, rows, ranks, is_row, SIZE: tl.constexpr):
    """Write rows of S values."""
    place = pointer + rows[:, None].to(tl.int64) * SIZE + ranks[None, :]
    tl.store(place, values, mask=is_row[:, None] & (ranks[None, :] < SIZE))


@triton.jit
@no_type_check
def forward_kernel(
    gate, gate_stride, up, up_stride,
    gate_rank, gate_rank_stride, up_rank, up_rank_stride,
    gate_B, gate_B_stride, up_B, up_B_stride,
    gate_scale, up_scale, gate_bias, up_bias,
    down_A, down_A_stride, keeps, experts, weights,
    hidden, down_rank,
    num_tokens, num_features, features_per_split,
    SIZE: tl.constexpr, RANK: tl.constexpr, TOP_K: tl.constexpr, APART: tl.constexpr,
    ACT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr, PADDED_S: tl.constexpr,
):  # fmt: skip
    """Write Σ_j g_j h_j, [T, F] (`APART`: each h_j, [K·T, F]), and drop(h_j) A_e(j)ᵀ, [N, T, S]."""
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    is_token = tokens < num_tokens
    ranks = tl.arange(0, PADDED_S)
    if down_A is not None:
        rank_total = tl.zeros((BLOCK_T, PADDED_S), DTYPE)
    first = split * features_per_split
    for start in range(first, tl.minimum(first + features_per_split, num_features), BLOCK_F):
        features = start + tl.arange(0, BLOCK_F)
        inside = is_token[:, None] & (features[None, :] < num_features)
        base_gate = _tile(gate, gate_stride, tokens, features, inside).to(DTYPE)
        if up is not None:
            base_up = _tile(up, up_stride, tokens, features, inside).to(DTYPE)
        total = tl.zeros((BLOCK_T, BLOCK_F), DTYPE)
        for slot in tl.static_range(TOP_K):
            chosen = tl.load(experts + slot * num_tokens + tokens, mask=is_token, other=-1)
            inner, _, _ = _adapted(
                base_gate, gate_rank, gate_rank_stride, gate_B, gate_B_stride, gate_scale,
                gate_bias, tokens, features, chosen, num_features, SIZE, RANK, BLOCK_S, PRECISION,
            )  # fmt: skip
            states, _ = _activate(inner, ACT)
            if up is not None:
                outer, _, _ = _adapted(
                    base_up, up_rank, up_rank_stride, up_B, up_B_stride, up_scale, up_bias,
                    tokens, features, chosen, num_features, SIZE, RANK, BLOCK_S, PRECISION,
                )  # fmt: skip
                states = states * outer
            if APART:
                rows = (slot * num_tokens + tokens)[:, None].to(tl.int64)
                place = hidden + rows * num_features + features[None, :]
                tl.store(place, states.to(hidden.dtype.element_ty), mask=inside)
            elif weights is not None:
                weight = tl.load(weights + slot * num_tokens + tokens, mask=is_token, other=0.0)
                total += weight[:, None].to(DTYPE) * states
            else:
                total += states
            if down_A is not None:
                if keeps is not None:
                    keep = _tile(keeps[slot], num_features, tokens, features, inside)
                    states = states * keep.to(DTYPE)
                place = down_A + ranks[None, :] * down_A_stride + features[:, None]
                lasting = (ranks[None, :] < SIZE) & (features[:, None] < num_features)
                weight_A = tl.load(place, mask=lasting, other=0.0)
                product = tl.dot(
                    states.to(weight_A.dtype), weight_A, input_precision=PRECISION, out_dtype=DTYPE
                )
                rank_total += tl.where(_own(chosen, ranks, SIZE, RANK), product, 0.0)
        if not APART:
            place = hidden + tokens[:, None].to(tl.int64) * num_features + features[None, :]
            tl.store(place, total.to(hidden.dtype.element_ty), mask=inside)
    if down_A is not None:
        _store_ranks(down_rank, rank_total, split * num_tokens + tokens, ranks, is_token, SIZE)


@triton.jit
@no_type_check
def _slot_gradients(
    base_gate, base_up, upstream,
    gate_rank, gate_rank_stride, up_rank, up_rank_stride,
    gate_B, gate_B_stride, up_B, up_B_stride,
    gate_scale, up_scale, gate_bias, up_bias,
    down_A, down_A_stride, grad_rank, keep, weight,
    tokens, features, experts, num_features,
    SIZE: tl.constexpr, RANK: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Compute a slot's hidden states again, and the gradients of its adapted gate and up.

    `upstream` is the gradient of the hidden rows; `keep`, the slot's dropout mask, and `weight`, g,
    may be None.

    Returns:
        The states; for gate and for up (gate's again in an ungated FFN) the gradient behind and
        before DoRA's row scale, and what that multiplies.
    """
    inner, gate_update, gate_factor = _adapted(
        base_gate, gate_rank, gate_rank_stride, gate_B, gate_B_stride, gate_scale, gate_bias,
        tokens, features, experts, num_features, SIZE, RANK, BLOCK_S, PRECISION,
    )  # fmt: skip
    activated, slope = _activate(inner, ACT)
    grad = upstream
    if weight is not None:
        grad = upstream * weight[:, None].to(upstream.dtype)
    if down_A is not None:
        through = tl.zeros(upstream.shape, upstream.dtype)
        through = _add_product(
            through, grad_rank, SIZE, down_A, down_A_stride, tokens, features, experts,
            num_features, SIZE, RANK, BLOCK_S, PRECISION,
        )  # fmt: skip
        if keep is not None:
            through = through * keep
        grad = grad + through
    states = activated
    gate_value_grad = grad * slope
    if base_up is not None:
        outer, up_update, up_factor = _adapted(
            base_up, up_rank, up_rank_stride, up_B, up_B_stride, up_scale, up_bias,
            tokens, features, experts, num_features, SIZE, RANK, BLOCK_S, PRECISION,
        )  # fmt: skip
        states = activated * outer
        gate_value_grad = gate_value_grad * outer
        up_value_grad = grad * activated
        up_grad = up_value_grad
        if up_scale is not None:
            up_grad = up_value_grad * up_factor
    gate_grad = gate_value_grad
    if gate_scale is not None:
        gate_grad = gate_value_grad * gate_factor
    if base_up is None:
        up_value_grad = gate_value_grad
        up_grad = gate_grad
        up_update = gate_update
    return states, gate_value_grad, gate_grad, gate_update, up_value_grad, up_grad, up_update


@triton.jit
@no_type_check
def _back_to_ranks(
    total, grad, B_pointer, B_stride, features, experts, num_features,
    SIZE: tl.constexpr, RANK: tl.constexpr, PADDED_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add `grad @ Bᵀ`, [t, S], to total at the columns of the token's expert."""
    ranks = tl.arange(0, PADDED_S)
    lasting = (ranks[None, :] < SIZE) & (features[:, None] < num_features)
    place = B_pointer + ranks[None, :] * B_stride + features[:, None]
    weight = tl.load(place, mask=lasting, other=0.0)
    product = tl.dot(
        grad.to(weight.dtype), weight, input_precision=PRECISION, out_dtype=total.dtype
    )
    return total + tl.where(_own(experts, ranks, SIZE, RANK), product, 0.0)


@triton.jit
@no_type_check
def token_kernel(
    gate, gate_stride, up, up_stride,
    gate_rank, gate_rank_stride, up_rank, up_rank_stride,
    gate_B, gate_B_stride, up_B, up_B_stride,
    gate_scale, up_scale, gate_bias, up_bias,
    down_A, down_A_stride, keeps, experts, weights,
    grad_hidden, grad_hidden_stride, grad_rank,
    grad_gate, grad_up, grad_gate_rank, grad_up_rank, grad_weights,
    num_tokens, num_features, features_per_split,
    SIZE: tl.constexpr, RANK: tl.constexpr, TOP_K: tl.constexpr, APART: tl.constexpr,
    ACT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr, PADDED_S: tl.constexpr,
    PADDED_K: tl.constexpr,
):  # fmt: skip
    """Write the gradients of gate and up, and sums over features.

    Those are the gradients of the rank-space activations of gate and up, [N, T, S], and
    Σ_f grad_hidden h_j of each slot, [N, T, K].
    """
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    is_token = tokens < num_tokens
    ranks = tl.arange(0, PADDED_S)
    slots = tl.arange(0, PADDED_K)
    if gate_B is not None:
        gate_total = tl.zeros((BLOCK_T, PADDED_S), DTYPE)
    if up_B is not None:
        up_total = tl.zeros((BLOCK_T, PADDED_S), DTYPE)
    if weights is not None:
        weight_total = tl.zeros((BLOCK_T, PADDED_K), DTYPE)
    first = split * features_per_split
    for start in range(first, tl.minimum(first + features_per_split, num_features), BLOCK_F):
        features = start + tl.arange(0, BLOCK_F)
        inside = is_token[:, None] & (features[None, :] < num_features)
        base_gate = _tile(gate, gate_stride, tokens, features, inside).to(DTYPE)
        base_up = None
        gate_sum = tl.zeros((BLOCK_T, BLOCK_F), DTYPE)
        if up is not None:
            base_up = _tile(up, up_stride, tokens, features, inside).to(DTYPE)
            up_sum = tl.zeros((BLOCK_T, BLOCK_F), DTYPE)
        for slot in tl.static_range(TOP_K):
            chosen = tl.load(experts + slot * num_tokens + tokens, mask=is_token, other=-1)
            rows = tokens + slot * num_tokens if APART else tokens
            upstream = _tile(grad_hidden, grad_hidden_stride, rows, features, inside).to(DTYPE)
            keep = None
            if keeps is not None:
                keep = _tile(keeps[slot], num_features, tokens, features, inside).to(DTYPE)
            weight = None
            if weights is not None:
                weight = tl.load(weights + slot * num_tokens + tokens, mask=is_token, other=0.0)
            states, _, gate_grad, _, _, up_grad, _ = _slot_gradients(
                base_gate, base_up, upstream, gate_rank, gate_rank_stride, up_rank, up_rank_stride,
                gate_B, gate_B_stride, up_B, up_B_stride, gate_scale, up_scale, gate_bias, up_bias,
                down_A, down_A_stride, grad_rank, keep, weight, tokens, features, chosen,
                num_features, SIZE, RANK, ACT, PRECISION, BLOCK_S,
            )  # fmt: skip
            gate_sum += gate_grad
            if gate_B is not None:
                gate_total = _back_to_ranks(
                    gate_total, gate_grad, gate_B, gate_B_stride, features, chosen, num_features,
                    SIZE, RANK, PADDED_S, PRECISION,
                )  # fmt: skip
            if up is not None:
                up_sum += up_grad
            if up_B is not None:
                up_total = _back_to_ranks(
                    up_total, up_grad, up_B, up_B_stride, features, chosen, num_features,
                    SIZE, RANK, PADDED_S, PRECISION,
                )  # fmt: skip
            if weights is not None:
                product = tl.sum(upstream * states, axis=1)
                weight_total += tl.where(slots[None, :] == slot, product[:, None], 0.0)
        place = tokens[:, None].to(tl.int64) * num_features + features[None, :]
        tl.store(grad_gate + place, gate_sum.to(grad_gate.dtype.element_ty), mask=inside)
        if up is not None:
            tl.store(grad_up + place, up_sum.to(grad_up.dtype.element_ty), mask=inside)
    rows = split * num_tokens + tokens
    if gate_B is not None:
        _store_ranks(grad_gate_rank, gate_total, rows, ranks, is_token, SIZE)
    if up_B is not None:
        _store_ranks(grad_up_rank, up_total, rows, ranks, is_token, SIZE)
    if weights is not None:
        _store_ranks(grad_weights, weight_total, rows, slots, is_token, TOP_K)


@triton.jit
@no_type_check
def _add_outer(
    total, rank_pointer, rank_stride, values, tokens, experts,
    SIZE: tl.constexpr, RANK: tl.constexpr, PADDED_S: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add activationsᵀ [S, t] @ values [t, f] to total, each token at its expert's rows."""
    ranks = tl.arange(0, PADDED_S)
    own = _own_transposed(experts, ranks, SIZE, RANK)
    place = rank_pointer + tokens[None, :].to(tl.int64) * rank_stride + ranks[:, None]
    activations = tl.load(place, mask=own, other=0.0)
    return tl.dot(
        activations, values.to(activations.dtype), total,
        input_precision=PRECISION, out_dtype=total.dtype,
    )  # fmt: skip


@triton.jit
@no_type_check
def _add_by_expert(
    total, values, experts, OPERAND: tl.constexpr, PADDED_E: tl.constexpr, PRECISION: tl.constexpr
):
    """Add each token's values [t, f] to the row of its expert, [E, f]."""
    one_hot = (tl.arange(0, PADDED_E)[:, None] == experts[None, :]).to(OPERAND)
    return tl.dot(
        one_hot, values.to(OPERAND), total, input_precision=PRECISION, out_dtype=total.dtype
    )


@triton.jit
@no_type_check
def feature_kernel(
    gate, gate_stride, up, up_stride,
    gate_rank, gate_rank_stride, up_rank, up_rank_stride,
    gate_B, gate_B_stride, up_B, up_B_stride,
    gate_scale, up_scale, gate_bias, up_bias,
    down_A, down_A_stride, keeps, experts, weights,
    grad_hidden, grad_hidden_stride, grad_rank,
    grad_gate_B, grad_up_B, grad_down_A, grad_gate_scale, grad_up_scale,
    num_tokens, num_features, tokens_per_split,
    SIZE: tl.constexpr, RANK: tl.constexpr, TOP_K: tl.constexpr, APART: tl.constexpr,
    ACT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_S: tl.constexpr, PADDED_S: tl.constexpr,
    EXPERTS: tl.constexpr, PADDED_E: tl.constexpr,
):  # fmt: skip
    """Write sums over tokens: the gradients of B and down's A, [N, S, F], and c, [N, E, F]."""
    features = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
    split = tl.program_id(1)
    if gate_B is not None:
        gate_total = tl.zeros((PADDED_S, BLOCK_F), DTYPE)
    if up_B is not None:
        up_total = tl.zeros((PADDED_S, BLOCK_F), DTYPE)
    if down_A is not None:
        down_total = tl.zeros((PADDED_S, BLOCK_F), DTYPE)
    if gate_scale is not None:
        gate_scale_total = tl.zeros((PADDED_E, BLOCK_F), DTYPE)
    if up_scale is not None:
        up_scale_total = tl.zeros((PADDED_E, BLOCK_F), DTYPE)
    first = split * tokens_per_split
    for start in range(first, tl.minimum(first + tokens_per_split, num_tokens), BLOCK_T):
        tokens = start + tl.arange(0, BLOCK_T)
        is_token = tokens < num_tokens
        inside = is_token[:, None] & (features[None, :] < num_features)
        base_gate = _tile(gate, gate_stride, tokens, features, inside).to(DTYPE)
        base_up = None
        if up is not None:
            base_up = _tile(up, up_stride, tokens, features, inside).to(DTYPE)
        for slot in tl.static_range(TOP_K):
            chosen = tl.load(experts + slot * num_tokens + tokens, mask=is_token, other=-1)
            rows = tokens + slot * num_tokens if APART else tokens
            upstream = _tile(grad_hidden, grad_hidden_stride, rows, features, inside).to(DTYPE)
            keep = None
            if keeps is not None:
                keep = _tile(keeps[slot], num_features, tokens, features, inside).to(DTYPE)
            weight = None
            if weights is not None:
                weight = tl.load(weights + slot * num_tokens + tokens, mask=is_token, other=0.0)
            states, gate_value, gate_grad, gate_update, up_value, up_grad, up_update = (
                _slot_gradients(
                    base_gate, base_up, upstream, gate_rank, gate_rank_stride,
                    up_rank, up_rank_stride, gate_B, gate_B_stride, up_B, up_B_stride,
                    gate_scale, up_scale, gate_bias, up_bias, down_A, down_A_stride, grad_rank,
                    keep, weight, tokens, features, chosen, num_features,
                    SIZE, RANK, ACT, PRECISION, BLOCK_S,
                )
            )  # fmt: skip
            if gate_B is not None:
                gate_total = _add_outer(
                    gate_total, gate_rank, gate_rank_stride, gate_grad, tokens, chosen,
                    SIZE, RANK, PADDED_S, PRECISION,
                )  # fmt: skip
            if up_B is not None:
                up_total = _add_outer(
                    up_total, up_rank, up_rank_stride, up_grad, tokens, chosen,
                    SIZE, RANK, PADDED_S, PRECISION,
                )  # fmt: skip
            if down_A is not None:
                if keep is not None:
                    states = states * keep
                down_total = _add_outer(
                    down_total, grad_rank, SIZE, states, tokens, chosen,
                    SIZE, RANK, PADDED_S, PRECISION,
                )  # fmt: skip
            if gate_scale is not None:
                gate_scale_total = _add_by_expert(
                    gate_scale_total, gate_value * gate_update, chosen, gate.dtype.element_ty,
                    PADDED_E, PRECISION,
                )  # fmt: skip
            if up_scale is not None:
                up_scale_total = _add_by_expert(
                    up_scale_total, up_value * up_update, chosen, gate.dtype.element_ty,
                    PADDED_E, PRECISION,
                )  # fmt: skip
    if gate_B is not None:
        _store_features(grad_gate_B, gate_total, split, features, num_features, SIZE, PADDED_S)
    if up_B is not None:
        _store_features(grad_up_B, up_total, split, features, num_features, SIZE, PADDED_S)
    if down_A is not None:
        _store_features(grad_down_A, down_total, split, features, num_features, SIZE, PADDED_S)
    if gate_scale is not None:
        _store_features(
            grad_gate_scale, gate_scale_total, split, features, num_features, EXPERTS, PADDED_E
        )
    if up_scale is not None:
        _store_features(
            grad_up_scale, up_scale_total, split, features, num_features, EXPERTS, PADDED_E
        )


@triton.jit
@no_type_check
def _store_features(
    pointer, values, split, features, num_features, ROWS: tl.constexpr, PADDED: tl.constexpr
):
    """Write a split's rows of some features."""
    rows = tl.arange(0, PADDED)
    place = pointer + (split * ROWS + rows)[:, None].to(tl.int64) * num_features + features[None, :]
    tl.store(place, values, mask=(rows[:, None] < ROWS) & (features[None, :] < num_features))
