"""Cross entropy of tokens through a head, without the logits of a whole batch.

Axes: N labelled tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

_CHUNK_BYTES = 15 << 22  # of float32 logits; in 16 bits under 32 MiB, which malloc keeps
_BLOCK_BYTES = 1 << 21


class _TokenLosses(torch.autograd.Function):
    """Losses of tokens, with their gradient to the hidden states made on the way."""

    # A token's loss depends on its own hidden state alone, so its gradient for an upstream gradient
    # of one can be kept, [N, D], and scaled later: each chunk of logits lives once.

    @staticmethod
    def forward(ctx, hidden_states, labels, head, vocab_size):
        with_grad = ctx.needs_input_grad[0]
        losses = []
        grads = []
        for states, chunk_labels in _chunks(vocab_size, hidden_states, labels):
            chunk_losses, grad = _chunk_losses(states, chunk_labels, head, with_grad)
            losses.append(chunk_losses)
            grads.append(grad)
        if with_grad:
            ctx.save_for_backward(torch.cat(grads))  # ty: ignore[invalid-argument-type]
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (unit_grad,) = ctx.saved_tensors
        return (unit_grad * grad[:, None]).to(unit_grad.dtype), None, None, None


def _chunk_losses(
    states: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor], with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute losses, and where asked the gradient of their sum to the states."""
    with torch.set_grad_enabled(with_grad):
        states = states.detach().requires_grad_(with_grad)
        logits = head(states)
    losses = states.new_empty(len(labels), dtype=_wide_dtype(states))
    grad_logits = None
    if with_grad:
        grad_logits = torch.empty_like(logits)
    for rows in _blocks(logits):
        targets = labels[rows, None]
        log_probs = logits.detach()[rows].to(losses.dtype).log_softmax(-1)
        losses[rows] = -log_probs.gather(1, targets).squeeze(1)
        if grad_logits is not None:
            # In place: a block of logits stays in the cache once, not three times.
            probs = log_probs.exp_()
            probs.scatter_add_(1, targets, probs.new_full(targets.shape, -1.0))
            grad_logits[rows] = probs
    if grad_logits is None:
        return losses, None
    (grad_states,) = torch.autograd.grad(logits, states, grad_logits)
    return losses, grad_states


def _blocks(logits: Tensor) -> Iterator[slice]:
    """Cut rows of logits into blocks that stay in the processor's cache."""
    num_rows = max(1, len(logits))  # of none there is one block, which is empty
    step = num_rows
    if logits.device.type == "cpu":
        step = max(1, _BLOCK_BYTES // (4 * logits.shape[1]))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def _chunks(vocab_size: int, *rows: Tensor) -> Iterable[tuple[Tensor, ...]]:
    size = max(1, _CHUNK_BYTES // (4 * vocab_size))
    return zip(*(values.split(size) for values in rows), strict=True)


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def token_losses(
    hidden_states: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
) -> Float[Tensor, " N"]:
    """`cross_entropy(head(hidden_states), labels, reduction="none")` in chunks."""
    # Losses are float32 or, of float64 states, float64. The head is the frozen output layer with
    # its scaling and soft-capping; its weights get no gradient.
    return _TokenLosses.apply(hidden_states, labels, head, vocab_size)


def trained_token_losses(
    hidden_states: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
) -> Float[Tensor, " N"]:
    """Compute what `token_losses` does, where the head's weights get a gradient too."""

    # It is a sum over tokens whose weights are known in the backward pass alone, so that logits are
    # made there again, a chunk at a time.
    def compute(states: Tensor, labels: Tensor) -> Tensor:
        logits = head(states).to(_wide_dtype(states))
        return cross_entropy(logits, labels, reduction="none")

    losses = [
        checkpoint(compute, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in _chunks(vocab_size, hidden_states, labels)
    ]
    return torch.cat(losses)


@torch.no_grad()
def token_scores(
    hidden_states: Float[Tensor, "N D"],
    labels: Int[Tensor, " N"],
    head: Callable[[Tensor], Tensor],
    vocab_size: int,
    num_top: int = 0,
) -> tuple[Float[Tensor, " N"], Bool[Tensor, " N"], Float[Tensor, "N K"], Int[Tensor, "N K"]]:
    """Compute log p of each label and of the K most likely tokens, the highest first, in chunks.

    Between them, whether argmax gives the label, of equally likely tokens the first; last, the ids
    of the most likely. Their log p are, to the bit, those of labels that are among them.
    """
    log_probs = []
    is_top = []
    top_log_probs = []
    top_ids = []
    for states, chunk_labels in _chunks(vocab_size, hidden_states, labels):
        logits = head(states)
        for rows in _blocks(logits):
            wide = logits[rows].to(_wide_dtype(logits))
            targets = chunk_labels[rows, None]
            total = wide.logsumexp(-1, keepdim=True)
            if num_top:
                top_logits, ids = wide.topk(num_top)
            else:
                top_logits = wide[:, :0]
                ids = targets[:, :0]
            label_log_probs = wide.gather(1, targets) - total
            matches = wide.argmax(-1, True) == targets
            log_probs.append(label_log_probs[:, 0])
            is_top.append(matches[:, 0])
            top_log_probs.append(top_logits - total)
            top_ids.append(ids)
    return torch.cat(log_probs), torch.cat(is_top), torch.cat(top_log_probs), torch.cat(top_ids)


def is_broken(logits: Float[Tensor, "... V"]) -> Bool[Tensor, "..."]:
    """Whether logits have no softmax: one is NaN or +inf, or all are -inf."""
    return ~logits.amax(-1).isfinite()
