import math
import re
from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from loraloom.adapters import VeraConfig
from loraloom.errors import ConfigError
from loraloom.training.settings import (
    LrScheduler,
    OptimizerConfig,
    OptimizerName,
)
from loraloom.training.step.optimizers import (
    build_optimizer,
    drop_frozen_gradients,
    parameter_groups,
    rates_of_their_own,
)
from tests.tiny import tiny_host
from tests.training.toy import ADAPTERS, add_job, toy_config, toy_engine, toy_host

NEEDED_ARGS = {
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 3},
}


def rates_of(method: str, **train):
    """Take the learning rates and decays of the kinds of weights of an adapter."""
    job = add_job(toy_host(), toy_config("a", ADAPTERS[method], **train))
    kinds = {id(one): name.rpartition(".")[2] for name, one in job.learner.parameters.items()}
    return {
        kinds[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(job.config.train, job.adapter)
        for parameter in group["params"]
    }


def test_loraplus_speeds_lora_b_up_and_nothing_else():
    rates = rates_of("mixdora", learning_rate=0.01, loraplus_lr_ratio=16)
    others = dict.fromkeys(("lora_A", "lora_magnitude_vector", "weight"), 0.01)
    assert {name: rate for name, (rate, _) in rates.items()} == others | {"lora_B": 0.16}


def test_everything_decays_but_magnitudes():
    rates = rates_of("mixdora", weight_decay=0.1)
    assert {name for name, (_, decay) in rates.items() if decay == 0} == {"lora_magnitude_vector"}
    assert {decay for _, decay in rates.values()} == {0.1, 0.0}


def test_norms_that_are_trained_whole_do_not_decay_as_in_transformers():
    config = ADAPTERS["lora"].model_copy(update={"modules_to_save": ("norm", "lm_head")})
    adapter = tiny_host(configs={"a": config}).adapter("a")
    groups = parameter_groups(OptimizerConfig(weight_decay=0.1), adapter)
    decays = {id(one): group["weight_decay"] for group in groups for one in group["params"]}
    own = {name: decays[id(one)] for name, one in adapter.own_modules.named_parameters()}
    assert sorted(own.values()) == [0.0, 0.1], own


def test_a_parameter_whose_name_ends_in_router_learns_at_the_routers_rate():
    adapter = tiny_host(configs={"a": ADAPTERS["lora"]}).adapter("a")
    own = adapter.own_modules.append(torch.nn.Module())[0]
    own.router = torch.nn.Parameter(torch.ones(2))
    own.rank_router = torch.nn.Linear(2, 2)
    own.router_scale = torch.nn.Parameter(torch.ones(2))
    names = {id(parameter): name for name, parameter in own.named_parameters()}
    config = OptimizerConfig(learning_rate=0.01, router_lr_ratio=3)
    ratios = {
        names[id(parameter)]: group["lr_ratio"]
        for group in parameter_groups(config, adapter)
        for parameter in group["params"]
        if id(parameter) in names
    }
    of_router, others = {"router", "rank_router.weight"}, {"rank_router.bias", "router_scale"}
    assert ratios == dict.fromkeys(of_router, 3) | dict.fromkeys(others, 1)


@pytest.mark.parametrize(
    "name", [name for name in get_args(OptimizerName) if not name.startswith("paged")]
)
def test_every_optimizer_steps_and_goes_on_after_a_save(tmp_path, name: OptimizerName):
    adapter = ADAPTERS["mixdora"]
    if is_8bit := name.endswith("bit"):
        pytest.importorskip("bitsandbytes")
        adapter = ADAPTERS["lora"].model_copy(update={"rank": 128})  # small tensors' have 32 bits
    config = toy_config("a", adapter, optimizer=name, max_steps=3)
    engine = toy_engine(tmp_path, [config], dtype=torch.float32)
    tensors = engine.jobs["a"].adapter.tensors()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    engine.step()
    engine.save_state()
    states = engine.jobs["a"].learner.optimizer.state.values()
    dtypes = {state["state1"].dtype for state in states if "state1" in state}
    assert (torch.uint8 in dtypes) is is_8bit
    assert any(not torch.equal(tensors[name], tensor) for name, tensor in before.items())
    again = toy_engine(tmp_path, [config], dtype=torch.float32)
    snapshot, _ = again.directory.checkpoints.newest()
    again.begin(snapshot)
    for one in (engine, again):
        one.step()
    assert all(map(torch.equal, tensors.values(), again.jobs["a"].adapter.tensors().values()))


def test_adafactor_moves_what_begins_as_zero(tmp_path):
    config = toy_config("a", optimizer="adafactor", learning_rate=0.01, max_steps=2)
    engine = toy_engine(tmp_path, [config], dtype=torch.float32)
    engine.step()
    tensors = engine.jobs["a"].adapter.tensors()
    assert max(float(one.abs().max()) for n, one in tensors.items() if "lora_B" in n) > 1e-3


STOPPING = {"patience": 2, "metric": "eval/skills/accuracy"}


def test_rungs_of_a_sweep_do_not_change_patience():
    settings = {"eval_steps": 4, "eval": [{"task": "skills"}], "early_stopping": STOPPING}
    job = add_job(toy_host(), toy_config("a", max_steps=9, **settings))
    for job.position.step in (0, 2, 3, 4):
        job.take_evaluation({job.selection.metric: 0.5})
    assert job.selection.evaluations_since == 1
    unmeasured = toy_config("b", max_steps=9, eval=[{"task": "skills"}])
    for other in (job, add_job(toy_host(), unmeasured)):
        other.position.step = 6
        other.best = None
        other.take_evaluation({other.selection.metric: 0.9})
        assert other.best is None


def learning_rates(**train) -> list[float]:
    """Return a job's learning rate at each of its steps."""
    job = add_job(toy_host(), toy_config("a", **train))
    rates = []
    for _ in range(job.total_steps):
        rates.append(job.learner.optimizer.param_groups[0]["lr"])
        job.learner.optimizer.step()
        job.scheduler.step()
    return rates


def test_linear_schedule_warms_up_and_comes_down_to_zero():
    rates = learning_rates(lr_scheduler="linear", learning_rate=1, warmup_steps=2, max_steps=6)
    assert rates == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])


REFUSED = [
    ({"optimizer_args": {"differentiable": True}}, "optimizer adamw"),
    ({"optimizer_args": {"fused": True, "foreach": True}}, "optimizer adamw"),
    ({"optimizer_args": {"betas": []}}, "optimizer adamw"),
    ({"optimizer_args": {"betas": [0.9, "x"]}}, "optimizer adamw"),
    ({"optimizer_args": {"eps": math.nan}}, "optimizer adamw"),
    ({"optimizer": "sgd", "optimizer_args": {"momentum": [1]}}, "optimizer sgd"),
    (
        {"lr_scheduler": "inverse_sqrt", "lr_scheduler_args": {"timescale": 0}},
        "lr_scheduler inverse_sqrt",
    ),
    (
        {"lr_scheduler": "cosine", "lr_scheduler_args": {"num_cycles": 10**400}},
        "lr_scheduler cosine",
    ),
    ({"lr_scheduler": "polynomial", "lr_scheduler_args": {"lr_end": 1}}, "lr_scheduler polynomial"),
    ({"lr_scheduler": "linear", "lr_scheduler_args": {"bates": 1}}, "lr_scheduler linear"),
]


@pytest.mark.parametrize(("settings", "what"), REFUSED, ids=str)
def test_arguments_that_torch_refuses_are_told(settings, what):
    with pytest.raises(ConfigError, match=f"^{what} does not accept .*_args"):
        add_job(toy_host(), toy_config("a", **settings))


@pytest.mark.parametrize("name", get_args(LrScheduler))
def test_every_schedule_can_be_built(name):
    arguments = NEEDED_ARGS.get(name, {})
    for max_steps in (1, 7):
        settings = {"lr_scheduler_args": arguments, "max_steps": max_steps}
        add_job(toy_host(), toy_config("a", lr_scheduler=name, **settings))


def test_experts_learn_at_rates_of_their_own_and_not_at_all_at_zero():
    ratios = {r"experts\.1\.\w+": 0.0, r"experts\.2\.lora_A": 0.25, "router": 2.0}

    def after_a_step(**settings):
        adapter = tiny_host(configs={"a": ADAPTERS["mixdora"]}).adapter("a")
        config = OptimizerConfig(learning_rate=0.01, weight_decay=0.1, **settings)
        optimizer = build_optimizer(config, adapter)
        before = {name: tensor.clone() for name, tensor in adapter.tensors().items()}
        for parameter in adapter.parameters():
            generator = torch.Generator().manual_seed(parameter.numel())
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)
        drop_frozen_gradients(config, adapter)
        ffn = [p.grad for n, p in adapter.named_parameters() if "mlp" in n and "router" not in n]
        assert settings == {} or not any(grad[1].any() for grad in ffn)
        assert all(grad[[0, 2]].any() for grad in ffn)
        with rates_of_their_own(config, adapter):
            optimizer.step()
        return {name: tensor - before[name] for name, tensor in adapter.tensors().items()}

    plain, own = after_a_step(), after_a_step(lr_ratios=ratios)
    for name, change in own.items():
        ratio = next((ratios[p] for p in ratios if re.search(rf"\.{p}$", name)), 1.0)
        torch.testing.assert_close(change, ratio * plain[name], rtol=1e-5, atol=1e-9)
        assert ratio > 0 or not change.any(), name


def test_a_pattern_that_no_tensor_has_is_refused():
    adapter = tiny_host(configs={"a": ADAPTERS["lora"]}).adapter("a")
    with pytest.raises(ConfigError, match=r"lr_ratios must match .*such as layers\..*got 'gate'"):
        build_optimizer(OptimizerConfig(lr_ratios={"gate": 0.5}), adapter)
    vera = tiny_host(configs={"a": VeraConfig(rank=2)}).adapter("a")
    with pytest.raises(ConfigError, match=r"lr_ratios must match .*, such as layers\..*'vera_A'"):
        build_optimizer(OptimizerConfig(lr_ratios={"vera_A": 0}), vera)  # which isn't trained
    config = OptimizerConfig(lr_ratios={".*": 0})
    optimizer = build_optimizer(config, vera)
    drop_frozen_gradients(config, vera)
    with rates_of_their_own(config, vera):
        optimizer.step()
    with pytest.raises(ConfigError, match="VeRA does not support loraplus_lr_ratio"):
        build_optimizer(OptimizerConfig(loraplus_lr_ratio=16), vera)
    with pytest.raises(ValidationError, match="is not a regular expression"):
        OptimizerConfig(lr_ratios={"(": 0.5})
