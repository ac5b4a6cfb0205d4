"""Rows of different adapters in one batch, in training as in evaluation."""

import copy

import pytest
import torch

import loraloom
from tests.adapters.plain import IDS, MASK
from tests.parity.dense_loop import DenseAdapter
from tests.tiny import (
    ALL_METHODS,
    METHODS,
    padded_mask,
    parameter_grads,
    randomise,
    relative_error,
    tiny_host,
    tiny_ids,
    tiny_model,
)


@pytest.mark.parametrize("hooked", ["self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"])
def test_hooks_have_the_bases_outputs_to_themselves(hooked):
    seen, results, ids, names = [], [], tiny_ids(2), ["a", "a"]

    def look(module, args, output):
        seen.append((args[0] @ module.weight.T, output))

    def tanh(module, args, output):
        return output.tanh()  # which autograd keeps

    def copied_tanh(module, args, output):
        return output.tanh().clone()

    for function in (tanh, copied_tanh, look):
        model = tiny_model()
        model.model.layers[0].get_submodule(hooked).register_forward_hook(function)
        host = loraloom.attach(model)
        adapter = randomise(host.add("a", METHODS["lora"]))
        host(ids, adapters=names).logits.square().sum().backward()
        with torch.no_grad(), host.prepared():
            host(ids, adapters=names)
        results.append(parameter_grads(adapter))
    for expected, output in seen:
        torch.testing.assert_close(output, expected)
    assert all(torch.equal(grad, results[1][name]) for name, grad in results[0].items())


def test_padding_rows_get_the_base_ffn():
    """A mixture never routes padding: its FFN there is the base's own."""
    host, ids = tiny_host(configs={"a": METHODS["mixlora"]}), tiny_ids(2)
    outputs, inputs = [], []
    mlp = host.model.model.layers[0].mlp
    hooks = [
        mlp.register_forward_hook(lambda module, args, output: outputs.append(output)),
        mlp.register_forward_pre_hook(lambda module, args: inputs.append(args[0])),
    ]
    mask = padded_mask([7, 3])
    with torch.no_grad():
        host(ids, mask, ["a", "a"])
        for hook in hooks:
            hook.remove()
        states, padding = inputs[0], ~mask.bool()
        expected = mlp.down_proj(mlp.act_fn(mlp.gate_proj(states)) * mlp.up_proj(states))
    torch.testing.assert_close(outputs[0][padding], expected[padding], rtol=0, atol=1e-12)
    assert not torch.allclose(outputs[0][~padding], expected[~padding])


MIXED = [("mixlora", 0.5), "lora", ("dora", 0.5), None, ("mixlora", 2.0), "mixlora", ("lora", -1.0)]


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "gpt_neox"])
def test_a_scale_is_a_factor_of_every_dense_update(family, method):
    plain = tiny_model(family)
    host = loraloom.attach(copy.deepcopy(plain))
    adapter = randomise(host.add("a", METHODS[method]))
    oracle = DenseAdapter(METHODS[method], host.base, adapter.tensors(), MASK, scale=-1.5)
    expected = oracle.attach(plain)(input_ids=IDS, attention_mask=MASK).logits[MASK.bool()]
    assert relative_error(host(IDS, MASK, [("a", -1.5)] * 2).logits[MASK.bool()], expected) < 1e-9


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
def test_a_session_and_generate_continue_rows_at_their_scales():
    host, ids = tiny_host(), tiny_ids(len(MIXED), 5)
    session = host.prefill(ids, None, MIXED)
    tokens = session.logits.argmax(-1)
    expected = host(torch.cat([ids, tokens.unsqueeze(1)], dim=1), None, MIXED).logits[:, -1]
    torch.testing.assert_close(host.decode(session, tokens), expected, rtol=1e-9, atol=1e-9)
    new = host.generate(ids, torch.ones_like(ids), MIXED, max_new_tokens=1, do_sample=False)
    assert new[:, -1].equal(tokens)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_with_a_cache_the_record_has_the_new_tokens():
    host, ids, mask = tiny_host(), tiny_ids(2), padded_mask([7, 5], "left")
    names = ["mixlora", "mixlora"]
    with torch.no_grad():
        full = host(ids, mask, names).routing["mixlora"]
        first = host(ids[:, :5], mask[:, :5], names, use_cache=True)
        rest = host(ids[:, 5:], mask, names, past_key_values=first.past_key_values)
    for layer in range(len(full)):
        assert len(first.routing["mixlora"][layer].router_logits) == 5 + 3
        expected = full[layer].router_logits[[5, 6, 10, 11]]
        torch.testing.assert_close(
            rest.routing["mixlora"][layer].router_logits, expected, rtol=0, atol=1e-10
        )
