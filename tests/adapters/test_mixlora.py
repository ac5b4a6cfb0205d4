"""What a mixture has beside its experts; the formula itself is in tests/parity."""

import copy

import pytest
import torch
from pydantic import ValidationError

import loraloom
from loraloom.adapters import MixLoraConfig, SharedExpertConfig
from tests.adapters.plain import IDS, MASK, check_ffn_gradients
from tests.tiny import changed, randomise, relative_error, tiny_host, tiny_model

PLAIN = MixLoraConfig(rank=2, alpha=4, num_experts=4, top_k=2, experts={"rank": 3, "alpha": 3})
CONFIG = changed(PLAIN, shared_expert={"rank": 2, "alpha": 5})
OF_FFN = ".mlp."


@pytest.mark.parametrize("family", ["llama", "phi", "phi3"])
def test_a_shared_expert_is_a_lora_merged_into_the_base_models_ffn(family):
    host = loraloom.attach(tiny_model(family))
    tensors = randomise(host.add("a", CONFIG)).tensors()
    changed_base = copy.deepcopy(tiny_model(family))
    for name, lora_B in tensors.items():
        if OF_FFN in name and "experts" not in name and name.endswith("lora_B"):
            place = name.removesuffix(".lora_B")
            module = changed_base.get_submodule(f"{host.base.layers_path}.{place[7:]}")
            with torch.no_grad():
                module.weight += 5 / 2 * lora_B @ tensors[f"{place}.lora_A"]
    other = loraloom.attach(changed_base)
    plain = other.add("a", PLAIN)
    plain.load_tensors({name: tensors[name] for name in plain.tensors()})
    real = MASK.bool()
    with torch.no_grad():
        logits, expected = (one(IDS, MASK, ["a", "a"]).logits[real] for one in (host, other))
    assert len(tensors) > len(plain.tensors())
    assert relative_error(logits, expected) < 1e-10


def test_derivatives_with_a_shared_expert_are_those_of_finite_differences():
    check_ffn_gradients(CONFIG)


def test_a_shared_expert_decodes_as_in_full_forwards():
    host = tiny_host(configs={"a": CONFIG, "b": CONFIG})
    ids, names = IDS, ["a", "b"]
    with torch.no_grad():
        whole = host(ids, adapters=names).logits[:, -1]
        step = host.decode(host.prefill(ids[:, :-1], adapters=names), ids[:, -1])
    assert relative_error(step, whole) < 1e-9


def test_a_shared_expert_is_saved_and_read_back(tmp_path):
    host = tiny_host(configs={"a": CONFIG})
    host.save("a", tmp_path / "a")
    again = host.load("again", tmp_path / "a")
    assert again.config.summary() == CONFIG.summary()
    default, given = (changed(PLAIN, shared_expert=one) for one in ({}, {"rank": 3, "alpha": 3}))
    assert default.summary() == given.summary()  # `start_from` compares them
    saved = host.adapters["a"].tensors()
    assert saved.keys() == again.tensors().keys() == CONFIG.tensor_shapes(host.base).keys()
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in saved.items())


def test_a_shared_expert_is_refused_where_norms_are_of_one_update():
    with pytest.raises(ValidationError, match="shared_expert and weight_decomposition exclude"):
        MixLoraConfig(weight_decomposition=True, shared_expert=SharedExpertConfig())
