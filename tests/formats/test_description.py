import pytest

from loraloom.adapters import ExpertsConfig, LoraConfig, MixLoraConfig
from loraloom.formats import describe
from tests.formats.tiny import write


def test_a_plain_adapter_is_described(base, tmp_path):
    write(tmp_path, base, LoraConfig(rank=4, alpha=8, target_modules=("q_proj",)))
    description = describe(tmp_path)
    assert (description["method"], description["settings"]["rank"]) == ("LoRA", 4)
    assert description["target_modules"] == ["q_proj"]
    assert description["num_layers"] == 2
    assert description["parameters"] == {"self_attn LoRA": 2 * 4 * (64 + 64)}
    assert description["percent_of_base"] == pytest.approx(100 * 1024 / 100_000)
    assert description["dtypes"] == ["float32"]
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    sizes.pop("README.md")
    assert description["file_bytes"] == sizes


def test_parameters_add_up_by_kind(base, tmp_path):
    config = MixLoraConfig(
        rank=4, num_experts=3, experts=ExpertsConfig(rank=2), weight_decomposition=True
    )
    tensors = write(tmp_path, base, config)
    description = describe(tmp_path)
    assert (description["method"], description["settings"]["experts"]) == ("MixDoRA", {"rank": 2})
    parameters = description["parameters"]
    assert parameters["router"] == 2 * 3 * 64
    assert parameters.keys() == {"router", "self_attn LoRA", "mlp experts", "magnitudes"}
    total = sum(tensor.numel() for tensor in tensors.values())
    assert description["num_parameters"] == sum(parameters.values()) == total


def test_the_references_checkpoints_are_described_with_no_size_of_the_base(shared_dir):
    description = describe(shared_dir / "fixtures/llama-mixlora" / "adapter")
    assert description["layout"] == "moe-peft"
    assert description["base_model"] == "llama/base"
    assert description["percent_of_base"] is None
