"""Rows that take a part, or a multiple, of what an adapter adds to the base model."""

from __future__ import annotations

import copy

import pytest
import torch

import loraloom
from loraloom.adapters import LoraConfig
from loraloom.errors import AdapterError
from loraloom.ops.low_rank import scale_update
from tests.parity.dense_loop import DenseAdapter
from tests.tiny import (
    ALL_METHODS,
    METHODS,
    padded_mask,
    randomise,
    relative_error,
    tiny_host,
    tiny_ids,
    tiny_model,
)

IDS = tiny_ids(2, 6)
MASK = padded_mask([6, 4], length=6)
SCALES = [-1.5, 0.25, 1.75]
MIXED = [("mixlora", 0.5), "lora", ("dora", 0.5), None, ("mixlora", 2.0), "mixlora", ("lora", -1.0)]


@torch.no_grad()
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "gpt_neox"])
def test_a_scale_is_a_factor_of_every_dense_update(family, method, scale):
    plain = tiny_model(family)
    host = loraloom.attach(copy.deepcopy(plain))
    adapter = randomise(host.add("a", METHODS[method]))
    oracle = DenseAdapter(METHODS[method], host.base, adapter.tensors(), MASK, scale=scale)
    expected = oracle.attach(plain)(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
    actual = host(IDS, MASK, [("a", scale)] * 2).logits[MASK.bool()]
    assert relative_error(actual, expected) < 1e-9


@torch.no_grad()
@pytest.mark.parametrize("method", sorted(ALL_METHODS.keys() - {"dora", "mixdora"}))
def test_every_method_scales_as_if_its_last_factor_were_multiplied(method):
    host = tiny_host(configs={"a": ALL_METHODS[method], "halved": ALL_METHODS[method]})
    tensors = host.adapters["a"].tensors()
    host.adapters["halved"].load_tensors(
        {key: t * 0.5 if key.endswith(("lora_B", "lambda_b")) else t for key, t in tensors.items()}
    )
    out = host(IDS, MASK, [("a", 0.5), "halved"])
    alone = host(IDS, MASK, ["halved", ("a", 0.5)])
    torch.testing.assert_close(out.logits, alone.logits, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("method", ALL_METHODS)
def test_scale_1_is_the_adapter_and_scale_0_the_base_model(method):
    host = tiny_host(configs={"a": ALL_METHODS[method]})
    assert torch.equal(host(IDS, MASK, [("a", 1.0)] * 2).logits, host(IDS, MASK, ["a"] * 2).logits)
    nothing, base = host(IDS, MASK, [("a", 0.0)] * 2).logits, host(IDS, MASK).logits
    torch.testing.assert_close(nothing, base, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_rows_of_different_scales_share_a_batch():
    host, ids = tiny_host(), tiny_ids(len(MIXED))
    alone = [host(ids[row : row + 1], None, [MIXED[row]]).logits for row in range(len(MIXED))]
    torch.testing.assert_close(host(ids, None, MIXED).logits, torch.cat(alone), rtol=0, atol=1e-9)


@torch.no_grad()
def test_stacked_decoding_scales_rows_as_well():
    host, ids = tiny_host(), tiny_ids(len(MIXED), 1)
    out = host(ids, None, MIXED)
    with host.prepared():
        stacked = host(ids, None, MIXED)
    torch.testing.assert_close(stacked.logits, out.logits, rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(stacked.routing["mixlora"], out.routing["mixlora"], strict=True):
        assert ours.selected_experts.equal(theirs.selected_experts)


@torch.no_grad()
def test_a_session_and_generate_continue_rows_at_their_scales():
    host, ids = tiny_host(), tiny_ids(len(MIXED), 5)
    session = host.prefill(ids, None, MIXED)
    tokens = session.logits.argmax(-1)
    longer = torch.cat([ids, tokens.unsqueeze(1)], dim=1)
    expected = host(longer, None, MIXED).logits[:, -1]
    torch.testing.assert_close(host.decode(session, tokens), expected, rtol=1e-9, atol=1e-9)
    new = host.generate(ids, torch.ones_like(ids), MIXED, max_new_tokens=1, do_sample=False)
    assert new[:, -1].equal(tokens)


@torch.no_grad()
def test_routing_has_one_entry_for_each_router_whatever_the_scales():
    host = tiny_host()
    rows = [("mixlora", 0.5), "mixlora"]
    routing = host(IDS, MASK, rows).routing["mixlora"]
    assert [entry.layer for entry in routing] == [0, 1]
    assert [len(entry.router_logits) for entry in routing] == [10, 10]
    alone = host(IDS[1:], MASK[1:], rows[1:]).routing["mixlora"]
    torch.testing.assert_close(routing[1].router_logits[6:], alone[1].router_logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_factor_that_comes_out_as_zero_keeps_the_update(dtype):
    """With c = 1/2 and λ = 2, c' = 0: the output is cΔ times 2 alone."""
    lora_B, row_scale = torch.ones(1, 3, dtype=dtype), torch.tensor([[0.5, 0.501, 1.0]])
    update, factors = scale_update(lora_B, row_scale, 2.0)
    added = (update * factors).float()
    torch.testing.assert_close(added, 2 * row_scale, rtol=1e-2, atol=0)
    wanted = 1 + 2 * (row_scale - 1)
    torch.testing.assert_close(factors, wanted, rtol=0, atol=torch.finfo(dtype).eps ** 0.5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("a", float("nan")), r"must be a name, \(name, scale\) with a finite scale, or None, got"),
        (("unknown", 0.5), "adapter must be one of those on this host"),
    ],
)
def test_other_rows_are_refused(row, message):
    host = tiny_host(configs={"a": LoraConfig(rank=2)})
    with pytest.raises(AdapterError, match=message):
        host(IDS, MASK, [row, None])
