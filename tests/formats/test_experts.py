"""LoRAs on stacked experts as other programs write them."""

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import loraloom
from loraloom.adapters import LoraConfig
from loraloom.errors import AdapterError, FormatError
from tests.formats.tiny import edit_config
from tests.tiny import relative_error, tiny_host, tiny_ids, tiny_model

IDS = tiny_ids(2)
LORA = LoraConfig(rank=2, expert_rank=2, alpha=6, target_modules=("experts",))
EXPERTS = "base_model.model.model.layers.{}.mlp.experts"


def rewritten(tmp_path, change, **fields):
    """A host and files of its adapter, whose tensors are changed as if others had saved them."""
    host = tiny_host("qwen3_moe", {"a": LORA}, torch.float32)
    host.save("a", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    tensors = {}
    for name, tensor in load_file(path).items():
        tensors |= change(name, tensor)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    edit_config(tmp_path / "a", **fields)
    return host, tensors


def as_unsloth(name, tensor):
    if "lora_B" not in name:
        return {name: tensor}
    return {name: tensor.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)}


@pytest.mark.parametrize("is_doubled", [False, True])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_gate_and_up_of_single_experts_become_one_projection(is_doubled, rank_stabilized, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for expert in range(4):
            shared = torch.randn(2, 32, generator=generator)
            for name, rows, columns in (("w1", 16, 32), ("w3", 16, 32), ("w2", 32, 16)):
                key = f"{EXPERTS.format(layer)}.{expert}.{name}"
                lora_A = torch.randn(2, columns, generator=generator)
                is_shared = name != "w2" and not is_doubled
                tensors[f"{key}.lora_A.weight"] = shared.clone() if is_shared else lora_A
                tensors[f"{key}.lora_B.weight"] = torch.randn(rows, 2, generator=generator)
    host, _ = rewritten(
        tmp_path,
        lambda name, tensor: tensors,
        target_parameters=None,
        target_modules=["q_proj", "w1", "w2", "w3"],
        use_rslora=rank_stabilized,
    )
    adapter = host.load("again", tmp_path / "a")
    stacks = adapter.tensors()
    key = "layers.1.mlp.experts.gate_up_proj"
    lora_A, lora_B = stacks[f"{key}.lora_A"], stacks[f"{key}.lora_B"]
    assert lora_A.shape == (4, 4 if is_doubled else 2, 32)
    single = f"{EXPERTS.format(1)}.3"
    updates = [
        tensors[f"{single}.{name}.lora_B.weight"] @ tensors[f"{single}.{name}.lora_A.weight"]
        for name in ("w1", "w3")
    ]
    assert relative_error(lora_B[3] @ lora_A[3], torch.cat(updates)) < 1e-6
    scale = 6 / 2**0.5 if rank_stabilized else 3
    assert adapter.config.at(key).scaling == pytest.approx(scale)


def test_an_expert_that_has_no_lora_is_named(tmp_path):
    tensors = {f"{EXPERTS.format(0)}.1.w2.lora_{side}.weight": torch.zeros(2, 2) for side in "AB"}
    host, _ = rewritten(tmp_path, lambda name, tensor: tensors, target_parameters=None)
    with pytest.raises(FormatError, match="lora_A of down_proj for all 2 experts, with rank 2"):
        host.load("again", tmp_path / "a")


def test_unsloths_order_of_columns_is_read_by_its_name(tmp_path):
    host, _ = rewritten(tmp_path, as_unsloth, lora_B_layout="grouped_by_expert")
    again = host.load("again", tmp_path / "a").tensors()
    for name, tensor in host.adapter("a").tensors().items():
        assert torch.equal(again[name], tensor), name
    edit_config(tmp_path / "a", lora_B_layout="other")
    with pytest.raises(FormatError, match="must be one of rank_major, grouped_by_expert"):
        host.load("b", tmp_path / "a")


@pytest.mark.parametrize(
    "fields",
    [
        {"auto_mapping": {"unsloth_fixed": True}},
        {"base_model_name_or_path": "unsloth/Qwen3-30B-A3B"},
    ],
)
def test_an_order_that_files_leave_open_is_asked_for(fields, tmp_path):
    host, _ = rewritten(tmp_path, as_unsloth, **fields)
    with pytest.raises(FormatError, match=r"which order have B's columns\?.*grouped_by_expert"):
        host.load("again", tmp_path / "a")


@pytest.mark.filterwarnings("ignore")  # that a rank_pattern is ignored, which then is applied
def test_pefts_all_linear_is_read_without_its_router(tmp_path):
    theirs = peft.get_peft_model(
        tiny_model("qwen3_moe"), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if weight.requires_grad and ".gate." not in name:  # B of the router stays 0
                weight.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "a")
    host = loraloom.attach(tiny_model("qwen3_moe"))
    with pytest.raises(AdapterError, match=r"adapts model\.layers\.0\.mlp\.gate.* no routers"):
        host.load("a", tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(path).items() if ".gate." not in name}, path)
    adapter = host.load("a", tmp_path / "a")
    assert adapter.tensors()["layers.0.mlp.experts.gate_up_proj.lora_A"].shape == (4, 4, 32)
    expected = theirs(input_ids=IDS).logits
    assert relative_error(host(IDS, adapters=["a"] * 2).logits, expected) < 1e-9
