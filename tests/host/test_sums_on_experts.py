"""Weighted sums of adapters on the experts of a base model, and one LoRA made of several there."""

from typing import Any

import pytest
import torch
from torch import Tensor

from loraloom.adapters import AdapterConfig, LoraConfig, RoutedConfig
from loraloom.adapters.contract import Projection
from loraloom.adapters.weighted_sum import parse_sum
from loraloom.base.blocks import Block
from loraloom.errors import AdapterError
from loraloom.host.host import Host
from loraloom.training.builder import load_start
from tests.tiny import ON_EXPERTS, changed, parameter_grads, relative_error, tiny_host, tiny_ids

IDS = tiny_ids(1, 9)
MEMBERS: dict[str, AdapterConfig] = {
    **{name: config for name, config in ON_EXPERTS.items() if not config.experts_per_router},
    "shared-too": changed(ON_EXPERTS["shared"], rank=4, alpha=3),
    "up": LoraConfig(rank=4, base_experts=(1,), target_modules=("experts.gate_up_proj",)),
    "down": LoraConfig(
        rank=4, base_experts=(2,), shared_outer=True, target_modules=("experts.down_proj",)
    ),
}
SUMS = [
    "lora:0.7+rslora:-0.3",
    "shared:0.5+shared-too:2",
    "shared:0.5+lora:0.25+some:-1",
    "up:0.5+down",
    "dora:0.5+lora",
    "shared-dora:-0.4+some-dora:0.7+shared",
    "some-dora:0.5+down",
    "lora:-0.2",
]


def whole_weight(updates: list[tuple[Any, float]], weight: Tensor, expert: int) -> Tensor:
    """Add up what adapters change of an expert's weight, [O, I]."""
    total = weight
    for update, factor in updates:
        experts = range(update.base.num_experts) if update.kept is None else update.kept.tolist()
        if expert not in experts:
            continue
        place = experts.index(expert)
        lora_A = update.lora_A[0].expand(len(experts), -1, -1)[place]
        lora_B = update.lora_B[0].expand(len(experts), -1, -1)[place]
        changed = weight + update.config.scaling * lora_B @ lora_A
        if update.lora_magnitude_vector is not None:
            magnitude = update.lora_magnitude_vector[0, place]
            changed = (magnitude / changed.norm(dim=1).detach())[:, None] * changed
        total = total + factor * (changed - weight)
    return total


def loop_over_experts(
    host: Host, text: str, block: Block, states: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Compute a block of experts one by one, each with a sum's whole weights."""
    updates: dict[str, list[tuple[Projection, float]]] = {}
    for name, factor in parse_sum(text):
        for projection, update in host.adapters[name].weights_on(block).items():
            updates.setdefault(projection, []).append((update, factor))
    (up,), (down,) = block.groups
    output = torch.zeros_like(states)
    for expert in range(block.num_experts or 0):
        tokens, slots = (index == expert).nonzero(as_tuple=True)
        rows = states[tokens]
        for projection in (up, down):
            base: Any = block.projections[projection]
            rows = rows @ whole_weight(updates.get(projection, []), base.weight[expert], expert).T
            bias = base.compute_bias(rows.dtype)
            if bias is not None:
                rows = rows + bias[expert]
            if projection == up:
                rows = block.gating(rows)
        output = output.index_add(0, tokens, rows * weights[tokens, slots, None])
    return output


def first_block_of_experts(host: Host) -> Block:
    blocks = host.adapters["lora"].base_layers[0].blocks
    return next(block for block in blocks if block.num_experts)


def run_block(host: Host, row: Any) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return what the first block of experts reads and gives in a row's forward."""
    calls = []
    experts = first_block_of_experts(host).output.linear
    hook = experts.register_forward_hook(lambda _, inputs, output: calls.append((inputs, output)))
    host(IDS, adapters=[row])
    hook.remove()
    return calls[0]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("text", SUMS)
def test_a_sum_is_a_loop_over_experts_with_whole_weights(family, text):
    host = tiny_host(family, MEMBERS)
    block = first_block_of_experts(host)
    inputs, output = run_block(host, text)
    inputs = tuple(tensor.detach() for tensor in inputs)
    expected = loop_over_experts(host, text, block, *inputs)
    _, without = run_block(host, None)
    assert relative_error(output, expected) < 1e-9
    assert relative_error(output, without) > 1e-2
    members = [host.adapters[name] for name, _ in parse_sum(text)]
    gradients = []
    for total in (run_block(host, text)[1], expected):
        total.square().sum().backward()
        gradients.append([parameter_grads(member) for member in members])
    for ours, theirs in zip(*gradients, strict=True):
        on_experts = {name for name in theirs if block.module_name in name}
        assert on_experts
        assert all(relative_error(ours[name], theirs[name]) < 1e-6 for name in on_experts)


def test_mixed_rows_with_sums_are_what_each_is_alone():
    host = tiny_host("qwen3_moe", MEMBERS | {"mix": ON_EXPERTS["mixlora"]})
    rows = [*SUMS, "lora", None, (SUMS[4], 0.5), "mix", "some:0.5+beside", "shared-dora"]
    ids = tiny_ids(len(rows))
    mixed = host(ids, adapters=rows).logits
    for number, row in enumerate(rows):
        alone = host(ids[[number]], adapters=[row]).logits
        assert relative_error(mixed[number], alone[0]) < 1e-7, row
    half = host(ids[[4]], adapters=[(SUMS[4], 0.5)]).logits
    assert relative_error(half, host(ids[[4]], adapters=["dora:0.25+lora:0.5"]).logits) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_text_of_sums_is_that_of_each_alone(dtype):
    host = tiny_host("qwen3_moe", MEMBERS, dtype)
    similar = [f"lora:{number / 4}+some:{1 - number / 4}" for number in range(4)]
    ids = tiny_ids(8)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    for rows in ([*similar, "lora", None, "some", SUMS[5]], similar):
        together = host.generate(ids[: len(rows)], adapters=rows, **greedy)
        for number, row in enumerate(rows):
            alone = host.generate(ids[[number]], adapters=[row], **greedy)
            text = together[number, : alone.shape[1]]  # padded where it has ended before others
            assert torch.equal(text, alone[0]), row


@torch.no_grad()
@pytest.mark.parametrize("text", ["lora", SUMS[0], SUMS[2], SUMS[5]])
def test_a_sum_is_merged_and_unmerged(text):
    host = tiny_host("qwen3_moe", MEMBERS)
    before = host(IDS).logits
    expected = host(IDS, adapters=[text]).logits
    host.merge(text)
    assert relative_error(host(IDS).logits, expected) < 1e-7
    host.unmerge(text)
    assert torch.equal(host(IDS).logits, before)


@torch.no_grad()
@pytest.mark.parametrize("text", SUMS[:4])
def test_loras_behind_one_another_are_their_sum(text, tmp_path):
    host = tiny_host("qwen3_moe", MEMBERS)
    names, weights = zip(*parse_sum(text), strict=True)
    combined = host.combine(names, weights, name="z")
    host.save("z", tmp_path)
    host.load("again", tmp_path)
    total, *others = (host(IDS, adapters=[row]).logits for row in (text, "z", "again"))
    assert relative_error(others[0], total) < 1e-7
    assert relative_error(others[1], total) < 1e-6  # files are in float32
    host.add("same", combined.config)
    same = host.adapter("same").tensors()
    assert all(same[name].shape == tensor.shape for name, tensor in combined.tensors().items())


def test_factors_that_all_experts_share_stay_shared():
    host = tiny_host("qwen3_moe", MEMBERS)
    combined = host.combine(["shared", "shared-too"], [0.5, 2.0], name="z")
    assert combined.tensors()["layers.0.mlp.experts.gate_up_proj.lora_A"].shape == (1, 5, 32)
    mixed = host.combine(["shared", "lora"], [0.5, 2.0], name="y")
    assert mixed.tensors()["layers.0.mlp.experts.gate_up_proj.lora_A"].shape == (4, 6, 32)


def test_a_sum_names_a_shared_experts_projections_apart_from_the_experts():
    configs = {"x": LoraConfig(rank=3, target_modules="ffn"), "y": LoraConfig(rank=2)}
    host = tiny_host("qwen2_moe", configs)
    combined = host.combine(["x", "y"], [0.5, 0.5], name="z")
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert combined.config.target_modules == names
    rows = ["z", "x:0.5+y:0.5"]
    logits = [host(IDS, adapters=[row]).logits for row in rows]
    assert relative_error(*logits) < 1e-7


@pytest.mark.parametrize(
    ("settings", "job"),
    [
        ({"rank": 4}, {"rank": 8}),
        ({"rank": 4, "expert_rank": 3}, {"rank": 8, "expert_rank": 6}),
        ({"rank": 4, "shared_outer": True}, {"rank": 8, "shared_outer": True}),
    ],
)
def test_a_job_of_the_summed_rank_starts_from_a_combination(settings, job, tmp_path):
    places = {"target_modules": ("attention", "experts")}
    host = tiny_host("qwen3_moe", {name: LoraConfig(**settings, **places) for name in "xy"})
    host.combine(["x", "y"], [0.5, 0.5], name="z")
    host.save("z", tmp_path)
    started = host.add("job", LoraConfig(**job, **places, alpha=8))
    load_start(host, started, str(tmp_path))
    assert relative_error(*(host(IDS, adapters=[row]).logits for row in ("job", "z"))) < 1e-6


def test_a_router_by_prompt_adds_up_adapters_on_experts():
    host = tiny_host("qwen3_moe", {"law": MEMBERS["lora"], "math": MEMBERS["some"]})
    experts = {"law": "law", "math": "math"}
    host.add("auto", RoutedConfig(experts=experts, top_k=2))
    weighted = (("auto/law", 0.75), ("auto/math", 0.25))
    expected = host(IDS, adapters=["law:0.75+math:0.25"]).logits
    assert relative_error(host(IDS, adapters=[weighted]).logits, expected) < 1e-7
    with pytest.raises(AdapterError, match=r"a base model's experts.*router: prompt accepts"):
        host.add("token", RoutedConfig(experts=experts, router="token"))


@pytest.mark.parametrize("method", ["mixlora", "mixdora"])
def test_mixtures_in_experts_have_no_sum(method):
    host = tiny_host("qwen3_moe", MEMBERS | {"mix": ON_EXPERTS[method]})
    with pytest.raises(AdapterError, match=r"'mix' \(Mix.* with experts; scale it alone"):
        host(IDS, adapters=["mix+lora"])
    for name, title in (("mix", r"Mix\w+"), ("dora", "DoRA")):
        with pytest.raises(AdapterError, match=f"must be LoRAs, got {title}"):
            host.combine([name, "lora"], [1.0, 1.0], name="z")
