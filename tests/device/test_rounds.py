"""Rounds on the pretend device: the CPU's numbers, and waits that don't grow with the model."""

import pytest

from loraloom.adapters import LoraConfig, MixLoraConfig, MolaConfig
from loraloom.training.settings import DpoConfig
from tests.device.hosts import assert_same, hosts_on, train
from tests.tiny import ALL_METHODS, METHODS

NAMES = list(ALL_METHODS)
EXPERTS = {
    "lora": LoraConfig(rank=4, target_modules="experts"),
    "dora": LoraConfig(rank=4, weight_decomposition=True, target_modules="experts"),
    "moe": MixLoraConfig(rank=4, num_experts=3, top_k=2, target_modules=("attention", "moe")),
    "mola": MolaConfig(rank=4, num_experts=3, top_k=2, target_modules=("moe",)),
}


@pytest.mark.parametrize(
    "options",
    [{}, {"row_length": 24}, {"objective": DpoConfig()}],
    ids=["padded", "packed", "dpo"],
)
def test_a_round_of_all_methods_has_the_cpus_losses_and_gradients(accelerator, options):
    host, cpu_host = hosts_on(accelerator.device)
    assert_same(train(host, NAMES, **options), train(cpu_host, NAMES, **options))


def test_a_checkpointed_round_has_the_cpus_losses_and_gradients(accelerator):
    host, cpu_host = hosts_on(accelerator.device, METHODS)
    host.enable_gradient_checkpointing()
    assert_same(train(host, list(METHODS)), train(cpu_host, list(METHODS)))


@pytest.mark.parametrize("name", NAMES)
def test_a_round_waits_as_often_for_four_layers_as_for_two(accelerator, name):
    for num_layers in (2, 4):
        config = ALL_METHODS[name]
        if name == "mola":
            config = config.model_copy(update={"num_experts": (3, 4) * (num_layers // 2)})
        host, cpu_host = hosts_on(accelerator.device, {name: config}, num_hidden_layers=num_layers)
        actual = train(host, [name])
        assert_same(actual, train(cpu_host, [name]))
        with accelerator.step(f"{num_layers} layers"):
            train(host, [name])
    assert accelerator.waits("4 layers") == accelerator.waits("2 layers")
    counts = accelerator.counts("2 layers")
    assert counts.pop("upload") <= 5
    assert counts == {"read": 2}


def test_a_round_of_a_base_models_experts_has_the_cpus_losses_and_gradients(accelerator):
    host, cpu_host = hosts_on(accelerator.device, EXPERTS, "qwen3_moe")
    assert_same(train(host, list(EXPERTS)), train(cpu_host, list(EXPERTS)))
