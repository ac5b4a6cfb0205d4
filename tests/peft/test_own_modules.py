"""Modules and tokens of an adapter's own, held to PEFT's `modules_to_save` and tokens."""

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import loraloom
from loraloom import AdapterError, LoraConfig
from loraloom.peft import LoraloomConfig
from tests.conftest import build_tokenizer
from tests.peft.test_peft_model import IDS, logits
from tests.tiny import (
    METHODS,
    changed,
    parameter_grads,
    randomise,
    relative_error,
    tiny_ids,
    tiny_model,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]

TOKENS = sorted(set(IDS.flatten().tolist()))[::3]
TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
BOTH = ["embed_tokens", "lm_head"]
CHOICES = {
    "head": (UNTIED, {"modules_to_save": ["lm_head"]}),
    "both": (UNTIED, {"modules_to_save": BOTH, "use_dora": True}),
    "norms": (UNTIED, {"modules_to_save": ["norm"]}),
    "ends of words": (UNTIED, {"modules_to_save": ["layernorm"]}),
    "tied, embeddings": (TIED, {"modules_to_save": ["embed_tokens"]}),
    "tied, both": (TIED, {"modules_to_save": BOTH}),
    "tokens": (UNTIED, {"trainable_token_indices": TOKENS[::-1]}),
    "tied tokens": (TIED, {"trainable_token_indices": TOKENS}),
    "tokens of both": (
        UNTIED,
        {"trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": [5, 2]}},
    ),
}


def model_of(changes, family="llama"):
    return tiny_model(family, torch.float32, **changes)


def move(module, seed=0):
    """Let trained weights change what is computed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            if weight.requires_grad:
                weight.add_(torch.empty_like(weight).normal_(std=0.1, generator=generator))
    return module


def trained_by_peft(changes, family="llama", **choice):
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "up_proj"]} | choice
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    return move(get_peft_model(model_of(changes, family), config)).eval()


@pytest.mark.parametrize("choice", CHOICES)
def test_what_peft_saves_gives_its_logits_and_gradients_and_goes_back(choice, tmp_path):
    changes, settings = CHOICES[choice]
    theirs = trained_by_peft(changes, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    host = loraloom.attach(model_of(changes))
    adapter = host.load("a", tmp_path / "theirs")
    expected = logits(theirs)
    assert relative_error(logits(host, adapters=["a"] * 3), expected) < 1e-5
    assert relative_error(logits(host), expected) > 1e-2

    host(IDS, adapters=["a"] * 3, training=True, labels=IDS).loss.backward()
    theirs(IDS, labels=IDS).loss.backward()
    wanted = [float(grad.norm()) for grad in parameter_grads(theirs).values()]
    ours = [float(grad.norm()) for grad in parameter_grads(adapter).values()]
    assert sorted(ours) == pytest.approx(sorted(wanted), rel=1e-4)

    host.save("a", tmp_path / "ours")
    again = PeftModel.from_pretrained(model_of(changes), tmp_path / "ours")
    assert relative_error(logits(again), expected) < 1e-5
    assert host.load("b", tmp_path / "ours").config == adapter.config
    saved = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert load_file(tmp_path / "ours" / "adapter_model.safetensors").keys() == saved.keys()


@pytest.mark.parametrize("family", ["gemma3_text", "granite", "gpt_neox"])
def test_scaled_embeddings_and_heads_keep_their_scale(family, tmp_path):
    embeddings = {"gpt_neox": "embed_in"}.get(family, "embed_tokens")
    targets = {"gpt_neox": ["query_key_value"]}.get(family, ["q_proj"])
    for place, choice in enumerate(
        [{"trainable_token_indices": {embeddings: TOKENS}}, {"modules_to_save": [embeddings]}]
    ):
        theirs = trained_by_peft({}, family, target_modules=targets, **choice)
        theirs.save_pretrained(tmp_path / str(place))
        host = loraloom.attach(model_of({}, family))
        host.load("a", tmp_path / str(place))
        assert relative_error(logits(host, adapters=["a"] * 3), logits(theirs)) < 1e-5


OURS = {
    "tied": (TIED, {"modules_to_save": ("embed_tokens", "norm")}),
    "untied": (UNTIED, {"modules_to_save": ("lm_head",), "trainable_token_indices": (4, 9, 3)}),
    "tokens": (TIED, {"trainable_token_indices": tuple(TOKENS)}),
}


def mixed_host(choice, dtype=torch.float64):
    """Adapters of several methods with modules of their own, and one without."""
    changes, settings = OURS[choice]
    host = loraloom.attach(tiny_model("llama", dtype, **changes))
    for seed, (name, config) in enumerate(METHODS.items()):
        own = {} if name == "dora" else settings
        move(randomise(host.add(name, changed(config, **own), seed), seed), seed)
    return host


@pytest.mark.parametrize("choice", OURS)
def test_rows_of_a_batch_have_their_own_modules_alone_and_together(choice):
    host = mixed_host(choice)
    names = ["mixlora", "lora", None, ("lora", 0.5), "dora", "mixdora", "lora"]
    ids = tiny_ids(len(names))
    with torch.no_grad():
        base = host(ids).logits
        alone = torch.cat([host(ids[[r]], adapters=[name]).logits for r, name in enumerate(names)])
        together = host(ids, adapters=names).logits
        assert relative_error(together, alone) < 1e-12
        assert relative_error(together[2], base[2]) < 1e-12
        states = host.hidden(ids, adapters=names).last_hidden_state
        assert relative_error(host.logits(states, names), together) < 1e-12
        session = host.prefill(ids[:, :-2], adapters=names)
        assert relative_error(session.logits, together[:, -3]) < 1e-9
        for column in (-2, -1):
            assert relative_error(host.decode(session, ids[:, column]), together[:, column]) < 1e-9
        assert relative_error(host(ids, adapters=[("lora", 0.0)] * len(ids)).logits, base) < 1e-9


def test_a_layer_norm_gets_inputs_of_its_dtype_as_cuda_asks(monkeypatch):
    host = loraloom.attach(tiny_model("phi", torch.bfloat16))
    host.add("own", LoraConfig(rank=2, modules_to_save=["input_layernorm", "final_layernorm"]))
    layer_norm, dtypes = functional.layer_norm, []

    def record(inputs, shape, weight, *others):
        dtypes.append((inputs.dtype, weight.dtype))
        return layer_norm(inputs, shape, weight, *others)

    monkeypatch.setattr(functional, "layer_norm", record)
    assert host(IDS, adapters=["own"] * 3).logits.isfinite().all()
    assert set(dtypes) == {(torch.float32,) * 2}


@pytest.mark.parametrize("choice", ["tied", "tokens"])
def test_modules_that_are_tied_are_saved_by_peft_and_by_a_view(choice, tmp_path):
    changes, settings = OURS[choice]
    config = LoraloomConfig(adapter=changed(METHODS["mixlora"], **settings), seed=1)
    wrapped = move(get_peft_model(model_of(changes), config)).eval()
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(model_of(changes), tmp_path).eval()
    assert torch.equal(logits(again), logits(wrapped))

    host = loraloom.attach(model_of(changes))
    host.load("a", tmp_path)
    view = host.as_model("a")
    save_file(view.state_dict(), tmp_path / "view.safetensors")
    kept = {name: tensor.clone() for name, tensor in view.state_dict().items()}
    move(view.adapter, 3)
    view.load_state_dict(load_file(tmp_path / "view.safetensors"))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in view.state_dict().items())


def test_the_bases_tables_do_not_take_the_place_of_own_ones(tmp_path):
    model, own = model_of(UNTIED), LoraConfig(rank=2, modules_to_save=BOTH)
    wrapped = move(get_peft_model(model, LoraloomConfig(adapter=own))).eval()
    wrapped.save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    theirs = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=BOTH)
    theirs = move(get_peft_model(model_of(UNTIED), theirs)).eval()
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    host = loraloom.attach(model_of(UNTIED))
    for name, expected in (("ours", wrapped), ("theirs", theirs)):
        host.load(name, tmp_path / name)
        found = host(IDS, adapters=[name] * 3).logits.detach()
        assert relative_error(found, logits(expected).detach()) < 1e-6
    view = host.as_model("ours")
    assert view._get_name() == "LlamaForCausalLM"
    with pytest.raises(AdapterError, match="trl's loss reads the base model's head"):
        view(IDS, fused_lm_head=True)


@pytest.mark.parametrize("choice", OURS)
def test_losses_are_those_of_each_rows_head_with_its_gradient(choice):
    host = mixed_host(choice)
    names = ["lora", None, "mixlora", "dora"]
    ids = tiny_ids(len(names))
    owners = [name for name in names for _ in ids[0, 1:]]
    labels = ids[:, 1:].flatten()

    def grads(loss):
        loss.backward()
        return {name: parameter_grads(host.adapter(name)) for name in METHODS}

    logits = host(ids, adapters=names, training=True).logits[:, :-1].flatten(0, 1)
    expected = cross_entropy(logits, labels, reduction="none")
    states = host.hidden(ids, adapters=names, training=True).last_hidden_state[:, :-1]
    states = states.flatten(0, 1)
    losses = host.token_losses(states, labels, owners)
    torch.testing.assert_close(losses, expected)
    weights = torch.arange(1.0, 1 + len(labels), dtype=torch.float64)
    want, have = grads((expected * weights).sum()), grads((losses * weights).sum())
    for name, own in want.items():
        assert have[name].keys() == own.keys()
        for key, grad in own.items():
            torch.testing.assert_close(have[name][key], grad, msg=f"{name} {key}")
    with torch.no_grad():
        scores, is_top, _, ids_of_top = host.token_scores(states, labels, owners, 2)
        torch.testing.assert_close(scores, -expected)
    assert torch.equal(is_top, ids_of_top[:, 0] == labels)
    assert torch.equal(ids_of_top, logits.topk(2).indices)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ("nope",)}, r"modules_to_save must name modules .*embed_tokens.*nope"),
        ({"modules_to_save": ("q_proj",)}, "which target_modules adapts"),
        ({"trainable_token_indices": (97,)}, r"must be in \[0, 97\).*resize_token_embeddings"),
        ({"trainable_token_indices": (7, 3, 7)}, "must name each token once, got 7, 3, 7"),
        (
            {"trainable_token_indices": {"embed_tokens": (7,), "model.embed_tokens": (8,)}},
            "must name model.embed_tokens once, got model.embed_tokens as well",
        ),
        ({"trainable_token_indices": {"norm": (1,)}}, r"embedding or head \(.*\), got norm"),
        (
            {"modules_to_save": ("embed_tokens",), "trainable_token_indices": (1,)},
            "trained whole or for some tokens, got model.embed_tokens",
        ),
    ],
)
def test_what_means_no_module_of_the_base_is_refused(settings, message):
    host = loraloom.attach(tiny_model(**TIED))
    with pytest.raises(AdapterError, match=message):
        host.add("a", LoraConfig(**settings))
    assert host.adapters == {}


def test_what_has_no_place_for_them_says_so(tmp_path):
    host = mixed_host("untied")
    with pytest.raises(AdapterError, match=r"without modules_to_save.*to be merged"):
        host.merge("lora")
    with pytest.raises(AdapterError, match="to be a GGUF adapter"):
        loraloom.export(host, build_tokenizer(), "lora", tmp_path / "out.gguf", "gguf")
    host.save("lora", tmp_path / "lora")
    with pytest.raises(AdapterError, match="to be read by MoE-PEFT"):
        loraloom.convert(tmp_path / "lora", tmp_path / "reference", "reference", host=host)
    loraloom.convert(tmp_path / "lora", tmp_path / "peft", "peft", host=host)
    host.load("back", tmp_path / "peft")
    own = host.adapter("back").tensors()
    assert all(torch.equal(own[k], v) for k, v in host.adapter("lora").tensors().items())


@pytest.mark.parametrize("choice", OURS)
@pytest.mark.parametrize("name", ["lora", "mixlora"])
def test_exported_models_have_them_in_place_of_the_bases(choice, name, tmp_path):
    host = mixed_host(choice, torch.float32)
    written = loraloom.export(host, build_tokenizer(), name, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(written.path, dtype=torch.float32)
    assert relative_error(logits(model), logits(host, adapters=[name] * 3)) < 1e-5
