"""Memory that is predicted without data, against what real tensors take on a CPU."""

import pytest
import torch

import loraloom
from loraloom.base.loading import build_base_model, load_base_model
from loraloom.base.quantization import predict_weight_bytes
from loraloom.errors import ConfigError, ModelError
from loraloom.ops import slot_pieces
from loraloom.training.learner import Learner
from loraloom.training.memory import kept_memory, longest_batch, peak_of_round, predict_memory
from loraloom.training.settings import RunConfig, TrainConfig
from loraloom.training.step.optimizers import count_trained, state_bytes
from tests.conftest import build_tokenizer
from tests.tiny import stored_weights, tiny_model

LORA = {"method": "lora", "rank": 8}
MIXTURE = {"method": "mixlora", "rank": 8, "num_experts": 4}
ON_BLOCKS = {**MIXTURE, "target_modules": ["attention", "moe"]}
ON_EXPERTS = {**MIXTURE, "target_modules": ["attention", "experts"]}
NOISE = {"dropout": 0.1, "router_jitter": 0.1}
CHECKPOINTED = {"gradient_checkpointing": True}
CASES = {
    "LoRA": ("llama", [LORA], {}),
    "mixture": ("llama", [MIXTURE], {}),
    "mixture, checkpointed": ("llama", [MIXTURE], CHECKPOINTED),
    "four jobs": ("llama", [LORA, MIXTURE, {**LORA, "weight_decomposition": True}, LORA], {}),
    "micro-batches": ("llama", [LORA] * 2, {"micro_batch_size": 2}),
    "packed pairs": ("llama", [LORA], {"objective": {"name": "dpo"}, "packing": True}),
    "eager attention": ("gpt_oss", [LORA], {}),
    "MoE": ("qwen3_moe", [LORA, ON_BLOCKS, ON_EXPERTS], {}),
    "MoE, checkpointed": ("qwen3_moe", [ON_EXPERTS], CHECKPOINTED),
    "dropout": ("llama", [{**LORA, "dropout": 0.1}, {**MIXTURE, **NOISE}], {}),
    "MoE, noise": ("qwen3_moe", [{**ON_EXPERTS, **NOISE, "rank": 3}], {}),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    families = {family for family, _, _ in CASES.values()}
    return {name: save_base(tmp_path_factory.mktemp(name), family=name) for name in families}


def save_base(directory, **changes):
    model = tiny_model(dtype=torch.float32, vocab_size=300, max_position_embeddings=256, **changes)
    model.save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return str(directory)


def make_run(base, adapters, train, **settings):
    train = {"batch_size": 4, "max_steps": 2, "max_length": 96, **train}
    jobs = [
        {"name": f"job{number}", "adapter": adapter, "data": {"task": "skills"}, "train": train}
        for number, adapter in enumerate(adapters)
    ]
    model = {"base_model": base, "device": "cpu", "dtype": "float32"}
    return RunConfig(**{**model, "output_dir": "unused", "jobs": jobs, **settings})


def load_jobs(run):
    model, _ = load_base_model(run.base_model, run.dtype, "cpu")
    host = loraloom.attach(model)
    for job in run.jobs:
        host.add(job.name, job.adapter)
    host.enable_gradient_checkpointing(run.jobs[0].train.gradient_checkpointing)
    return host


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_what_is_predicted(name, bases, monkeypatch):
    family, adapters, train = CASES[name]
    # As on accelerators: a CPU sorts tokens by expert, and works on a few rows at once.
    monkeypatch.setattr(slot_pieces, "group_size", lambda *sizes: None)
    monkeypatch.setattr(slot_pieces, "_piece_rows", lambda *sizes: 1 << 40)
    run = make_run(bases[family], adapters, train)
    weights_bytes, *_, step_bytes = predict_memory(run).parts.values()
    host = load_jobs(run)
    measured = peak_of_round(host, [longest_batch(host, job) for job in run.jobs])
    assert step_bytes == pytest.approx(measured, rel=0.03)
    weights = [*host.model.parameters(), *host.model.buffers()]
    assert weights_bytes == sum(weight.nbytes for weight in weights)


def test_an_optimizer_keeps_what_is_predicted(bases):
    run = make_run(bases["llama"], [MIXTURE], {"lr_ratios": {"router": 0}})
    host = load_jobs(run)
    learner = Learner(host.adapter("job0"), run.jobs[0].train, host.dtype)
    kept = kept_memory(run.jobs[0], learner.adapter)
    for weight in learner.parameters.values():
        weight.grad = torch.ones_like(weight)
    learner.apply()
    kept_tensors = list(learner.parameters.values())  # a copy, until a loss is finite again
    for state in learner.optimizer.state.values():
        kept_tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert kept.optimizer_bytes == pytest.approx(sum(t.nbytes for t in kept_tensors), rel=0.01)
    assert predict_memory(run).jobs == {"job0": kept}
    assert kept.num_trained == count_trained(learner.config, learner.adapter)


@pytest.mark.parametrize(("optimizer", "megabytes"), {"sgd": 0, "adamw_8bit": 2}.items())
def test_states_take_bytes_for_each_of_a_million_numbers(optimizer, megabytes):
    config = TrainConfig(optimizer=optimizer, learning_rate=1e-3, max_steps=1)
    weights = [torch.empty(1000, 1000, device="meta")]
    assert state_bytes(config, weights) == pytest.approx(megabytes * 1e6, abs=1e5)


@pytest.mark.parametrize(
    ("quantization", "changes"),
    [
        ("nf4", {}),
        ("nf4", {"family": "qwen3_moe", "moe_intermediate_size": 128}),
        ("int8", {}),
        ("torchao-int8", {}),
    ],
)
def test_quantized_weights_take_what_is_predicted(quantization, changes, tmp_path):
    base = save_base(tmp_path, hidden_size=256, intermediate_size=512, **changes)
    model = build_base_model(base, "float32", "cpu", None)
    quantized, _ = load_base_model(base, "float32", quantization=quantization)
    stored = {tensor.data_ptr(): tensor for _, tensor in stored_weights(quantized)}
    measured = sum(tensor.nbytes for tensor in stored.values())
    assert predict_weight_bytes(model, quantization) == pytest.approx(measured, rel=0.05)


def test_the_settings_of_the_run_count_without_its_card(bases):
    settings = {"max_tokens_per_step": 800, "device": "cuda:7", "attn_implementation": "eager"}
    train = {"optimizer": "paged_adamw_8bit"}
    memory = predict_memory(make_run(bases["llama"], [LORA] * 3, train, **settings))
    assert next(iter(memory.parts)) == "base model, float32"
    assert [*memory.parts][-1] == f"gradients and activations, {2 * 4 * 96} tokens"


def test_faults_are_those_of_the_run(bases, tmp_path):
    with pytest.raises(ConfigError, match="job job0: lr_ratios must match names"):
        predict_memory(make_run(bases["llama"], [LORA], {"lr_ratios": {"router": 0}}))
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(ModelError, match="does not support quantized checkpoints"):
        predict_memory(make_run(str(tmp_path), [LORA], {}))
