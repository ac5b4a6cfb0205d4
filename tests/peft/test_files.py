"""PEFT's files with every way of choosing modules, ranks and alphas: read, computed, written."""

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model

import loraloom
from loraloom import AdapterError, LoraConfig
from tests.peft.test_peft_model import IDS, logits
from tests.tiny import parameter_grads, randomise, relative_error, tiny_model

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHOICES = {
    "rank_pattern": {"rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\.down_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 32, "up_proj": 3}},
    "both": {"rank_pattern": {".*_proj": 2}, "alpha_pattern": {r"layers\.0\..*": 16}},
    "full names": {"rank_pattern": {r"^model\.layers\.0\.self_attn\.q_proj": 6}},
    "rslora": {"rank_pattern": {"q_proj": 9}, "use_rslora": True},
    "dora": {"rank_pattern": {"q_proj": 6, "gate_proj": 2}, "use_dora": True},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "exclude_modules": {"exclude_modules": ["k_proj", "layers.1.mlp.up_proj"]},
    "exclude a pattern": {"exclude_modules": r".*layers\.0\.mlp\..*"},
    "target a pattern": {"target_modules": r".*layers\.1\.self_attn\.[qv]_proj"},
    "target places": {"target_modules": ["layers.0.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    "bare names": {"target_modules": ["q_proj", "down_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


def trained_by_peft(family: str = "llama", **choice):
    """A PEFT model whose adapter changes the logits; in float32."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM"} | choice
    model = get_peft_model(tiny_model(family, torch.float32), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
            if "magnitude" in name:
                weight.mul_(torch.empty_like(weight).uniform_(0.5, 2))
    return model.eval()


@pytest.mark.parametrize(
    ("choice", "safe"), [(choice, place % 2 == 0) for place, choice in enumerate(CHOICES)]
)
def test_what_peft_saves_gives_its_logits_and_gradients_and_goes_back(choice, safe, tmp_path):
    theirs = trained_by_peft(**CHOICES[choice])
    theirs.save_pretrained(tmp_path / "theirs", safe_serialization=safe)
    host = loraloom.attach(tiny_model(dtype=torch.float32))
    host.load("a", tmp_path / "theirs")
    expected = logits(theirs)
    assert relative_error(logits(host, adapters=["a"] * 3), expected) < 1e-5
    host(IDS, adapters=["a"] * 3, training=True, labels=IDS).loss.backward()
    theirs(IDS, labels=IDS).loss.backward()
    wanted = [float(grad.norm()) for grad in parameter_grads(theirs).values()]
    ours = [float(grad.norm()) for grad in parameter_grads(host.adapter("a")).values()]
    assert sorted(ours) == pytest.approx(sorted(wanted), rel=1e-4)
    host.save("a", tmp_path / "ours")
    again = PeftModel.from_pretrained(tiny_model(dtype=torch.float32), tmp_path / "ours")
    assert relative_error(logits(again), expected) < 1e-5
    host.load("b", tmp_path / "ours")
    assert host.adapter("b").config == host.adapter("a").config


def test_places_are_found_by_peft_where_layers_have_another_name(tmp_path):
    base = [tiny_model("gptj", torch.float32, rotary_dim=4) for _ in range(2)]
    host = loraloom.attach(base[0])
    randomise(host.add("a", LoraConfig(target_modules=("layers.1.attn.q_proj", "fc_in"))))
    host.save("a", tmp_path)
    again = PeftModel.from_pretrained(base[1], tmp_path)
    assert relative_error(logits(again), logits(host, adapters=["a"] * 3)) < 1e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": (2,)}, r"layers must name layers in \[0, 2\), got 2"),
        ({"rank_pattern": {"nope": 3}}, "pattern must match adapted projections.*got nope"),
        ({"alpha_pattern": {"q_proj": 3}, "target_modules": "ffn"}, "alpha_pattern must match"),
        ({"target_modules": ("layers.9.mlp.up_proj",)}, "target_modules must name projections"),
        ({"target_modules": ("layers.1.mlp.up_proj", "q_proj"), "layers": (0,)}, "got layers.1"),
    ],
)
def test_choices_without_effect_are_refused(settings, message):
    host = loraloom.attach(tiny_model())
    with pytest.raises(AdapterError, match=message):
        host.add("a", LoraConfig(**settings))
