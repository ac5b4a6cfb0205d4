"""Products of rows that are sorted by group with their group's weights.

Axes: Q rows, G groups, I in_features, O out_features.
"""

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm


class GroupedProduct(torch.autograd.Function):
    """Rows that are sorted by group, [Q, I], times their group's weight, [G, I, O].

    `known` is the product where it was computed before, or is not read.
    """

    # torch's own takes no float64, and no gradients that are expanded

    @staticmethod
    def forward(ctx, rows, weights, stops, known):
        ctx.save_for_backward(rows, weights, stops)
        if known is not None:
            return known.view_as(known)
        return multiply_groups(_quick(rows), _quick(weights), stops).to(rows.dtype)

    @staticmethod
    def backward(ctx, grad):  # ty: ignore[incompatible-method-override]
        rows, weights, stops = ctx.saved_tensors
        dtype = rows.dtype
        rows = _quick(rows)
        weights = _quick(weights)
        grad = _quick(grad.contiguous())
        grad_rows = grad_weights = None
        if ctx.needs_input_grad[0]:
            grad_rows = multiply_groups(grad, weights.transpose(1, 2), stops).to(dtype)
        if ctx.needs_input_grad[1]:
            # laid out as the weights are, so that nothing has to be copied to be added up
            if weights.stride(2) == 1:
                grad_weights = _products_over_rows(rows, grad, stops)
            else:
                grad_weights = _products_over_rows(grad, rows, stops).transpose(1, 2)
            grad_weights = grad_weights.to(dtype)
        return grad_rows, grad_weights, None, None


def _quick(values: Tensor) -> Tensor:
    """Give a CPU's 16-bit values in float32: a kernel is built for each new number of rows."""
    is_slow = values.device.type == "cpu" and values.dtype in (torch.bfloat16, torch.float16)
    return values.float() if is_slow else values


def multiply_groups(rows: Tensor, weights: Tensor, stops: Tensor) -> Tensor:
    if len(weights) == 1:
        return rows @ weights[0]
    if _has_kernel(rows, weights):
        return grouped_mm(rows, weights, offs=stops)
    output = rows.new_empty(len(rows), weights.shape[2])
    start = 0
    for group, stop in enumerate(stops.tolist()):
        if start < stop:
            torch.mm(rows[start:stop], weights[group], out=output[start:stop])
        start = stop
    return output


def _products_over_rows(rows: Tensor, grad: Tensor, stops: Tensor) -> Tensor:
    """Compute each group's xᵀ grad, [G, I, O]."""
    if len(stops) == 1:
        return (rows.T @ grad).unsqueeze(0)
    if _has_kernel(rows, grad):
        return grouped_mm(rows.T, grad, offs=stops)
    output = rows.new_zeros(len(stops), rows.shape[1], grad.shape[1])
    start = 0
    for group, stop in enumerate(stops.tolist()):
        if start < stop:
            torch.mm(rows[start:stop].T, grad[start:stop], out=output[group])
        start = stop
    return output


def _has_kernel(rows: Tensor, weights: Tensor) -> bool:
    """Whether torch has a grouped product for these: rows of whole 16 bytes, and no float64."""
    sizes = (*rows.shape[1:], *weights.shape[1:])
    is_aligned = all(size * rows.element_size() % 16 == 0 for size in sizes)
    return rows.dtype != torch.float64 and is_aligned


def group_stops(groups: Tensor, num_groups: int) -> Tensor:
    """Count the rows up to each group's last, [G]; bincount would wait for a device."""
    numbers = torch.arange(num_groups, device=groups.device)
    return torch.searchsorted(groups, numbers, right=True, out_int32=True)
