"""Every family of base models with every method: the table that `families.py` promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    OPTConfig,
    OPTForCausalLM,
)

import loraloom
from loraloom.errors import ModelError
from loraloom.models.families import FAMILIES
from loraloom.routing.record import LayerRouting
from tests.tiny import (
    ALL_FAMILIES,
    LAYERS,
    METHODS,
    PADS_RIGHT_ONLY,
    changed,
    padded_mask,
    parameter_grads,
    relative_error,
    tiny_host,
    tiny_ids,
    tiny_model,
)

every_family = pytest.mark.parametrize("family", ALL_FAMILIES)
every_method = pytest.mark.parametrize("method", METHODS)
SMALL = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
NAMES = ["mixlora", None, "lora", "mixdora", "dora", "mixlora"]
LENGTHS = [7, 5, 3, 7, 6, 4]


def sides(family: str) -> list[str]:
    return ["right"] if family in PADS_RIGHT_ONLY else ["right", "left"]


def test_the_families_asked_for_are_there():
    asked = (
        "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 olmo2 granite stablelm "
        "gpt_neox smollm3"
    )
    assert set(asked.split()) <= FAMILIES.keys()


@every_family
def test_without_adapters_logits_are_the_base_models_bit_by_bit(family):
    model = tiny_model(family)
    with torch.no_grad():
        expected = model(tiny_ids(3)).logits
        host = loraloom.attach(model)
        host.add("a", METHODS["mixdora"])
        assert torch.equal(host(tiny_ids(3)).logits, expected)
        assert torch.equal(host(tiny_ids(3), adapters=[None] * 3).logits, expected)


@every_family
def test_hidden_states_through_the_head_are_the_logits(family):
    host = tiny_host(family)
    with torch.no_grad():
        out = host.hidden(tiny_ids(4), adapters=[*METHODS])
        logits = host(tiny_ids(4), adapters=[*METHODS]).logits
    assert torch.equal(host.logits(out.last_hidden_state), logits)


@every_family
def test_token_losses_are_those_of_the_base_models_logits(family):
    model, ids = tiny_model(family), tiny_ids(3)
    with torch.no_grad():
        logits = model(ids).logits.flatten(0, 1)
        expected = nn.functional.cross_entropy(logits, ids.flatten(), reduction="none")
        host = loraloom.attach(model)
        states = host.hidden(ids).last_hidden_state.flatten(0, 1)
        torch.testing.assert_close(host.token_losses(states, ids.flatten()), expected)


@every_method
@every_family
def test_an_adapter_changes_its_rows(family, method):
    host = tiny_host(family, {"a": METHODS[method]})
    with torch.no_grad():
        adapted, base = host(tiny_ids(2), adapters=["a", None]).logits
        alone = host(tiny_ids(2)).logits
    assert relative_error(adapted, alone[0]) > 1e-2
    torch.testing.assert_close(base, alone[1], rtol=1e-10, atol=1e-10)


@every_method
@every_family
def test_every_weight_gets_a_gradient_and_the_base_none(family, method):
    host = tiny_host(family, {"a": METHODS[method]})
    host.train()
    ids = tiny_ids(3)
    states = host.hidden(ids, adapters=["a"] * 3, sample_keys=range(3)).last_hidden_state
    host.token_losses(states.flatten(0, 1), ids.flatten()).sum().backward()
    for name, parameter in host.adapters["a"].named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.flatten(0 if parameter.dim() < 3 else 1).any(), name
    assert all(parameter.grad is None for parameter in host.model.parameters())


@every_method
@every_family
def test_saved_and_loaded_adapters_give_the_same_logits(family, method, tmp_path):
    host = tiny_host(family, {"a": METHODS[method]})
    host.save("a", tmp_path / "a")
    host.load("b", tmp_path / "a")
    with torch.no_grad():
        logits = [host(tiny_ids(2), adapters=[name] * 2).logits for name in "ab"]
    assert relative_error(logits[1], logits[0]) < 1e-6


@every_family
def test_each_row_of_a_mixed_batch_is_as_alone(family):
    host, ids = tiny_host(family), tiny_ids(6)
    for side in sides(family):
        mask = padded_mask(LENGTHS, side)
        with torch.no_grad():
            together = host(ids, mask, NAMES).logits
            for row, name in enumerate(NAMES):
                one, real = slice(row, row + 1), mask[row].bool()
                alone = host(ids[one], mask[one], [name]).logits[0]
                assert relative_error(together[row][real], alone[real]) < 1e-10, (side, name)


@every_family
def test_in_float32_each_row_of_a_mixed_batch_is_as_alone(family):
    host, ids = tiny_host(family, dtype=torch.float32), tiny_ids(6)
    for side in sides(family):
        mask = padded_mask(LENGTHS, side)
        with torch.no_grad():
            together = host(ids, mask, NAMES)
            assert routing_margin(together.routing) > 1e-4
            for row, name in enumerate(NAMES):
                one, real = slice(row, row + 1), mask[row].bool()
                alone = host(ids[one], mask[one], [name]).logits[0]
                assert relative_error(together.logits[row][real], alone[real]) < 1e-5, (side, name)


def routing_margin(routing: dict[str, list[LayerRouting]]) -> float:
    """The least distance between the last chosen and the first rejected router logit."""
    margins = []
    for layer in (layer for layers in routing.values() for layer in layers):
        top_k = layer.selected_experts.shape[1]
        ordered = layer.router_logits.sort(-1, descending=True).values
        margins.append((ordered[:, top_k - 1] - ordered[:, top_k]).min())
    return float(torch.stack(margins).min())


@every_family
def test_padding_does_not_change_a_row(family):
    host, ids, names = tiny_host(family), tiny_ids(4, 5), [*METHODS]
    atol = 1e-5 if family == "gemma2" else 1e-10  # its softmax is float32's, which some CPUs round
    with torch.no_grad():
        bare = host(ids, adapters=names).logits
        for side in sides(family):
            pads = torch.zeros(4, 3, dtype=torch.long)
            parts = [ids, pads] if side == "right" else [pads, ids]
            mask = padded_mask([5] * 4, side, length=8)
            # what `generate` passes; otherwise transformers counts padding as positions
            positions = (mask.cumsum(1) - 1).clamp_min(0)
            padded = host(torch.cat(parts, 1), mask, names, position_ids=positions).logits
            torch.testing.assert_close(padded[mask.bool()].view_as(bare), bare, rtol=0, atol=atol)


@every_family
def test_checkpointing_gives_the_same_gradients(family):
    noisy = {name: changed(config, dropout=0.2) for name, config in METHODS.items()}
    host, ids, mask = tiny_host(family, noisy), tiny_ids(6), padded_mask(LENGTHS)
    host.train()
    results = []
    for enabled in (False, True):
        host.enable_gradient_checkpointing(enabled)
        out = host.hidden(ids, mask, NAMES, sample_keys=range(6))
        loss = host.token_losses(out.last_hidden_state.flatten(0, 1), ids.flatten()).sum()
        loss = loss + sum(layer.router_logits.square().sum() for layer in out.routing["mixlora"])
        loss.backward()
        results.append({n: parameter_grads(a) for n, a in host.adapters.items()})
    for name, plain in results[0].items():
        for key, grad in plain.items():
            torch.testing.assert_close(results[1][name][key], grad, rtol=1e-12, atol=1e-12, msg=key)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@every_family
def test_decoding_with_a_cache_is_a_full_forward(family):
    host, ids, mask, names = tiny_host(family), tiny_ids(4), padded_mask([7] * 4), [*METHODS]
    with torch.no_grad():
        full = host(ids, mask, names).logits
        out = host(ids[:, :4], mask[:, :4], names, use_cache=True)
        pieces = [out.logits]
        for start, stop in ((4, 5), (5, 7)):
            past = out.past_key_values
            out = host(ids[:, start:stop], mask[:, :stop], names, past_key_values=past)
            pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=0, atol=1e-10)


@every_family
def test_detach_gives_back_a_model_with_bit_equal_outputs(family):
    model, ids = tiny_model(family), tiny_ids(3)
    with torch.no_grad():
        before = model(ids).logits
        host = loraloom.attach(model)
        for name, config in METHODS.items():
            host.add(name, config)
        host.train().enable_gradient_checkpointing()
        host.hidden(ids, adapters=["lora", "mixlora", "mixdora"], sample_keys=range(3))
        assert host.detach() is model
        assert torch.equal(model.eval()(ids).logits, before)


@every_family
def test_what_formats_need_to_know_is_right(family):
    host = tiny_host(family, {})
    base = host.base
    assert base.model_type == family
    assert base.num_layers == LAYERS
    assert base.num_parameters == sum(p.numel() for p in host.model.parameters())
    for path, shape in base.shapes.items():
        linear = host.model.get_submodule(f"{base.layers_path}.0.{path}")
        assert tuple(linear.weight.shape) == shape
    linears = {
        name
        for name, module in host.model.get_submodule(f"{base.layers_path}.0").named_modules()
        if isinstance(module, nn.Linear)
    }
    assert base.shapes.keys() == linears


def test_the_fingerprint_tells_weights_apart_and_not_dtypes():
    prints = [
        tiny_host("llama", {}, seed=seed, dtype=dtype).base.fingerprint
        for seed, dtype in ((0, torch.float32), (0, torch.bfloat16), (1, torch.float32))
    ]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("model", "linears"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2)), "lm_head"),
        (
            lambda: OPTForCausalLM(
                OPTConfig(num_hidden_layers=1, hidden_size=8, ffn_dim=8, num_attention_heads=2)
            ),
            "fc1, fc2, k_proj, lm_head, out_proj, q_proj, v_proj",
        ),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "0"),
        (
            lambda: LlamaModel(LlamaConfig(num_hidden_layers=1, **SMALL)),
            "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
    ],
    ids=["gpt2", "opt", "no transformer", "no causal LM"],
)
def test_an_unsupported_model_is_told_the_families_and_its_linear_modules(model, linears):
    with pytest.raises(ModelError) as caught:
        loraloom.attach(model())
    message = str(caught.value)
    assert all(family in message for family in FAMILIES)
    assert message.endswith(f"its linear modules are {linears}")


def test_a_classifier_is_no_causal_language_model():
    config = LlamaConfig(num_hidden_layers=1, **SMALL)
    with pytest.raises(ModelError, match="causal LM"):
        loraloom.attach(LlamaForSequenceClassification(config))
