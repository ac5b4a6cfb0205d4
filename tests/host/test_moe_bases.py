"""Base models that are mixtures of experts: adapters on the experts, and beside the whole block."""

import copy
import json
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import loraloom
from loraloom.adapters import (
    AdapterConfig,
    HydraLoraConfig,
    LoraConfig,
    LoraMoeConfig,
    MixLoraConfig,
    MolaConfig,
    VeraConfig,
)
from loraloom.errors import AdapterError, FormatError, ModelError
from loraloom.host.expert_choices import busiest_experts, count_choices
from loraloom.host.trial import try_adapters
from loraloom.training.builder import load_start
from tests.tiny import (
    MOE_TYPES,
    ON_EXPERTS,
    changed,
    parameter_grads,
    relative_error,
    tiny_host,
    tiny_ids,
    tiny_model,
)

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "qwen2_moe", "gpt_oss")
TYPES = (*FAMILIES, "qwen3_next", *MOE_TYPES)
IDS = tiny_ids(3)
PLACED: dict[str, AdapterConfig] = ON_EXPERTS | {
    "mola-beside": MolaConfig(rank=2, alpha=4, num_experts=3, top_k=2, target_modules=("moe",)),
    "mixlora-beside": MixLoraConfig(
        rank=2, alpha=4, num_experts=3, top_k=2, target_modules=("attention", "moe")
    ),
    "loramoe-beside": LoraMoeConfig(rank=2, alpha=4, num_experts=3, target_modules=("moe",)),
    "hydralora-beside": HydraLoraConfig(rank=2, alpha=4, num_experts=3, target_modules=("moe",)),
    "vera-beside": VeraConfig(rank=5, target_modules=("moe",)),
}


@pytest.mark.parametrize("family", TYPES)
def test_a_type_passes_the_trial_and_is_itself_without_adapters(family):
    model = tiny_model(family, torch.float32)
    before = model(input_ids=IDS).logits
    host = loraloom.attach(model)
    try_adapters(host)
    host.add("a", LoraConfig(target_modules="experts"))
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert torch.equal(host(IDS).logits, before)
    assert "experts" in {block.kind for block in host.base.blocks}


@pytest.mark.parametrize("family", TYPES)
def test_every_expert_that_got_tokens_has_a_gradient(family):
    host = tiny_host(family, {"a": PLACED["lora"]})
    seen: dict[str, set[int]] = {}

    def keep(module: Any, args: tuple[Tensor, ...]) -> None:
        seen.setdefault(module.key, set()).update(args[1].flatten().tolist())

    for projection in host.adapter("a").projections():
        experts: Any = projection.base.linear
        experts.key = projection.key.rpartition(".")[0]
        if projection.name == "down_proj":
            experts.register_forward_pre_hook(keep)
    host(IDS, adapters=["a"] * 3).logits.square().sum().backward()
    for projection in host.adapter("a").projections():
        gradient = projection.get_parameter("lora_B").grad[0].flatten(1)
        used = gradient.abs().sum(1).nonzero().flatten().tolist()
        assert set(used) == seen[projection.key.rpartition(".")[0]]


@pytest.mark.parametrize("family", TYPES)
def test_a_checkpointed_step_with_dropout_is_the_same_step(family):
    configs = {name: changed(PLACED[name], dropout=0.3) for name in ("lora", "mixdora")}
    host = tiny_host(family, configs)
    steps = []
    for checkpointing in (False, True):
        host.train().enable_gradient_checkpointing(checkpointing)
        states = host.hidden(IDS, adapters=[*configs, None], sample_keys=range(3))
        states.last_hidden_state.square().sum().backward()
        steps.append([parameter_grads(host.adapter(name)) for name in configs])
    for step, checkpointed in zip(*steps, strict=True):
        assert step.keys() == checkpointed.keys()
        assert all(torch.equal(checkpointed[name], grad) for name, grad in step.items())


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "gemma4_text", "deepseek_v3"])
def test_mixed_rows_are_what_each_is_alone(family):
    names = [name for name in PLACED if family != "gemma4_text" or "beside" not in name]
    host = tiny_host(family, {name: PLACED[name] for name in names})
    ids = tiny_ids(len(names) + 1)
    mixed = host(ids, adapters=[*names, None]).logits
    for row, name in enumerate([*names, None]):
        alone = host(ids[row : row + 1], adapters=[name]).logits
        assert relative_error(mixed[row], alone[0]) < 1e-7, name


@pytest.mark.parametrize(
    "targets",
    [
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        ["mlp.experts.down_proj"],
        ["mlp.experts.gate_up_proj"],
    ],
    ids=["both", "down", "up"],
)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
@pytest.mark.filterwarnings("ignore")  # that a rank_pattern is ignored, which then is applied
def test_pefts_adapters_are_read_and_written_to_the_bit(family, targets, tmp_path):
    model = tiny_model(family)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=targets,
        rank_pattern={"mlp.experts.down_proj": 5} if len(targets) > 1 else {},
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    trained = [weight for weight in theirs.parameters() if weight.requires_grad]
    with torch.no_grad():
        for weight in trained:
            weight.normal_(std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    host = loraloom.attach(copy.deepcopy(model))
    adapter = host.load("a", tmp_path / "theirs")
    ours = host(IDS, adapters=["a"] * 3).logits
    expected = theirs(input_ids=IDS).logits
    assert relative_error(ours, expected) < 1e-9
    ours.square().sum().backward()
    expected.square().sum().backward()
    squares = []
    for weights in (adapter.parameters(), trained):
        squares.append(sum(float(weight.grad.square().sum()) for weight in weights))
    assert squares[0] == pytest.approx(squares[1], rel=1e-6)  # norms are in float32
    host.save("a", tmp_path / "ours")
    files = [
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")
    ]
    assert files[0].keys() == files[1].keys()
    assert all(
        torch.equal(tensor.float(), files[1][name].float()) for name, tensor in files[0].items()
    )
    again = peft.PeftModel.from_pretrained(model, str(tmp_path / "ours"))
    assert relative_error(again(input_ids=IDS).logits, expected) < 1e-7


@pytest.mark.parametrize("name", PLACED)
def test_files_give_back_what_was_saved(name, tmp_path):
    host = tiny_host("qwen3_moe", {name: PLACED[name]})
    host.save(name, tmp_path / "a")
    host.load("again", tmp_path / "a")
    tensors = host.adapter("again").tensors()
    assert all(
        torch.equal(tensors[key], value) for key, value in host.adapter(name).tensors().items()
    )
    logits = host(IDS[:2], adapters=[name, "again"])
    assert torch.equal(logits.logits[0], host(IDS[:2, :], adapters=[name, name]).logits[0])


def test_files_of_an_early_peft_are_refused(tmp_path):
    host = tiny_host("qwen3_moe", {"lora": PLACED["lora"]})
    host.save("lora", tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "peft_version": "0.18.0"}))
    with pytest.raises(FormatError, match=r"PEFT 0\.18\.0 .* load the adapter with PEFT 0\.19\.1"):
        host.load("b", tmp_path / "a")


@torch.no_grad()
@pytest.mark.parametrize("name", ["lora", "dora", "shared-dora", "some-dora"])
def test_a_scale_is_of_what_an_adapter_does_to_the_weights(name):
    host = tiny_host("qwen3_moe", {name: PLACED[name]})
    halved = host(IDS, adapters=[(name, 0.5)] * 3).logits
    for projection in host.adapter(name).projections():
        base = projection.base
        base.set_weight((base.weight + projection.merged(torch.float64)) / 2)
    assert relative_error(halved, host(IDS).logits) < 1e-7


def test_the_busiest_experts_are_counted_by_layer():
    host = tiny_host("qwen3_moe", {})
    counts = count_choices(host, [[5, 6, 7], [8] * 4], lambda rows: None)
    assert [int(count.sum()) for count in counts.values()] == [14, 14]
    assert busiest_experts({0: torch.tensor([1, 6, 0, 3]), 2: torch.tensor([2, 2])}, 0.7) == {
        0: [1, 3],
        2: [0, 1],
    }
    with pytest.raises(ModelError, match="mixture of experts"):
        count_choices(tiny_host("llama", {}), [], lambda rows: None)


@pytest.mark.parametrize(
    ("settings", "rank", "scaling"),
    [
        ({}, 4, 2.0),
        ({"expert_rank": 3}, 3, 2.0),
        ({"expert_rank": 8}, 8, 2.0),
        ({"expert_rank": 4, "rank_stabilized": True}, 4, 16 / 8**0.5),
        ({"rank_pattern": {r"experts\.\w+": 2}}, 2, 8.0),
    ],
)
def test_experts_have_a_rank_of_their_own_and_the_scaling_of_the_others(
    settings, rank, scaling, tmp_path
):
    config = LoraConfig(rank=8, alpha=16, target_modules=("attention", "experts"), **settings)
    host = tiny_host(family="qwen3_moe", configs={"a": config})
    host.save("a", tmp_path / "a")
    for adapter in (host.adapter("a"), host.load("again", tmp_path / "a")):
        for projection in adapter.projections():
            is_stacked = projection.base.num_experts is not None
            assert projection.config.rank == (rank if is_stacked else 8)
            if is_stacked:
                assert projection.config.scaling == pytest.approx(scaling)
    host.add("same", host.adapter("a").config)
    assert host.adapter("same").config == host.adapter("a").config
    load_start(host, host.adapter("same"), str(tmp_path / "a"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LoraConfig(target_modules=("moe",), weight_decomposition=True),
            r"DoRA decomposes weights, and layers\.0\.mlp\.moe is a whole block",
        ),
        (
            MolaConfig(target_modules=("experts",)),
            "MoLA works on single projections.*lora or mixlora",
        ),
        (VeraConfig(target_modules=("experts",)), "VeRA works on single projections"),
        (
            MixLoraConfig(target_modules=("experts",), routing="switch", compat="moe-peft"),
            "compat must be unset on the experts",
        ),
        (
            LoraConfig(target_modules=("experts",), base_experts=(1, 4)),
            r"base_experts must be in \[0, 4\) in layer 0, got 4",
        ),
        (
            LoraConfig(target_modules=("experts",), base_experts={2: (1,)}),
            r"base_experts must name layers in \[0, 2\), got 2",
        ),
        (
            LoraConfig(target_modules=("attention",), base_experts=(1,)),
            "base_experts requires target_modules on a base model's experts",
        ),
    ],
    ids=["dora beside", "mola", "vera", "compat", "expert", "layer", "no experts"],
)
def test_what_cannot_be_there_is_refused_with_what_to_use(config, message):
    host = tiny_host("qwen3_moe", {}, torch.float32)
    with pytest.raises(AdapterError, match=message):
        host.add("a", config)


def test_an_update_beside_a_block_is_not_merged():
    host = tiny_host("qwen3_moe", {"beside": PLACED["beside"]})
    with pytest.raises(AdapterError, match="beside a whole block"):
        host.merge("beside")


def test_routers_of_a_shared_expert_and_of_experts_are_recorded_apart():
    config = MixLoraConfig(rank=2, num_experts=3, top_k=2, target_modules=("ffn", "experts"))
    host = tiny_host("qwen2_moe", {"mix": config})
    output = host(IDS, adapters=["mix"] * 3, training=True, sample_keys=[0, 1, 2])
    assert [len(record.router_logits) for record in output.routing["mix"]] == [IDS.numel()] * 4
    assert host.auxiliary_loss(output).isfinite()
