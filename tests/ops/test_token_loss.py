"""Cross entropy of tokens through a frozen head, in chunks."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from loraloom.ops import token_loss
from loraloom.ops.token_loss import token_losses, token_scores

D, V = 6, 11


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(V, D, dtype=torch.float64)


def heads(weight):
    return {
        "linear": lambda states: states @ weight.T,
        "biased": lambda states: states @ weight.T + weight[:, 0],
        "soft-capped": lambda states: torch.tanh(states @ weight.T / 3) * 3,
    }


@pytest.mark.parametrize("chunk_bytes", [1, 4 * V * 2, 1 << 26])
@pytest.mark.parametrize("head", ["linear", "biased", "soft-capped"])
def test_losses_and_gradients_are_those_of_cross_entropy(head, chunk_bytes, weight, monkeypatch):
    monkeypatch.setattr(token_loss, "_CHUNK_BYTES", chunk_bytes)
    function = heads(weight)[head]
    states, labels = torch.randn(7, D, dtype=torch.float64), torch.randint(0, V, (7,))
    upstream = torch.rand(7, dtype=torch.float64)
    results = []
    for compute in (
        lambda x: token_losses(x, labels, function, V),
        lambda x: cross_entropy(function(x), labels, reduction="none"),
    ):
        leaf = states.clone().requires_grad_()
        losses = compute(leaf)
        losses.backward(upstream)
        results.append((losses.detach(), leaf.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_losses_are_float32_and_gradients_in_the_dtype_of_the_states_alone(dtype, weight):
    states, weight = (one.to(dtype).requires_grad_() for one in (torch.randn(4, D), weight))
    losses = token_losses(states, torch.randint(0, V, (4,)), heads(weight)["linear"], V)
    losses.sum().backward()
    assert (losses.dtype, states.grad.dtype) == (torch.float32, dtype)
    assert weight.grad is None  # a frozen head


def test_a_diverged_token_leaves_the_others_as_they_are(weight):
    states = torch.randn(4, D, dtype=torch.float64)
    labels = torch.randint(0, V, (4,))
    results = []
    for value in (1.0, torch.nan):
        leaf = states.clone()
        leaf[2] = value
        leaf.requires_grad_()
        losses = token_losses(leaf, labels, heads(weight)["linear"], V)
        losses.sum().backward()
        results.append((losses.detach(), leaf.grad))
    others = [0, 1, 3]
    assert results[1][0][2].isnan()
    assert all(torch.equal(a[others], b[others]) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("chunk_bytes", [1, 4 * V * 2, 1 << 26])
@pytest.mark.parametrize("head", ["linear", "biased", "soft-capped"])
def test_scores_are_log_softmax_and_argmax(head, chunk_bytes, weight, monkeypatch):
    monkeypatch.setattr(token_loss, "_CHUNK_BYTES", chunk_bytes)
    function = heads(weight)[head]
    states = torch.randn(7, D, dtype=torch.float64)
    log_softmax = function(states).log_softmax(-1)
    labels = log_softmax.argmax(-1)
    labels[::2] = (labels[::2] + 1) % V
    log_probs, is_top, *_ = token_scores(states, labels, function, V)
    torch.testing.assert_close(log_probs, log_softmax[torch.arange(7), labels])
    assert is_top.tolist() == [False, True] * 3 + [False]
    for num_top in (0, 1, 3, V):
        _, _, values, ids = token_scores(states, labels, function, V, num_top)
        expected = log_softmax.topk(num_top)
        torch.testing.assert_close(values, expected.values)
        assert torch.equal(ids, expected.indices)
    assert torch.equal(values.gather(1, ids.argsort(1))[torch.arange(7), labels], log_probs)


def test_scores_of_bfloat16_are_computed_in_float32(weight):
    states = torch.randn(3, D, dtype=torch.bfloat16)
    function = heads(weight.bfloat16())["linear"]
    log_probs, *_ = token_scores(states, torch.tensor([1, 2, 3]), function, V)
    expected = function(states).float().log_softmax(-1)[torch.arange(3), [1, 2, 3]]
    torch.testing.assert_close(log_probs, expected)


def test_no_labels_have_no_losses_and_no_scores(weight):
    states = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    labels, head = torch.zeros(0, dtype=torch.long), heads(weight)["linear"]
    losses = token_losses(states, labels, head, V)
    losses.sum().backward()
    assert losses.shape == (0,)
    assert [len(values) for values in token_scores(states, labels, head, V)] == [0] * 4
