from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from loraloom.adapters import VeraConfig
from loraloom.errors import ConfigError
from loraloom.training.settings import (
    SCHEDULERS_ON_METRIC,
    LrScheduler,
    OptimizerConfig,
    OptimizerName,
)
from loraloom.training.step.optimizers import (
    OPTIMIZERS,
    build_optimizer,
    build_scheduler,
    parameter_groups,
    rehearse,
)
from tests.tiny import tiny_host
from tests.training.toy import ADAPTERS, add_job, toy_config, toy_engine, toy_host

NEEDED_ARGS = {
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 3},
}


def groups_of(method: str, **train):
    """Name an adapter's groups: parameter -> (learning rate, weight decay)."""
    job = add_job(toy_host(), toy_config("a", ADAPTERS[method], **train))
    names = {id(parameter): name for name, parameter in job.parameters.items()}
    groups = parameter_groups(job.config.train, job.adapter)
    return {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


def rates_of(method: str, **train):
    """Take the learning rates and decays of the kinds of weights of an adapter."""
    groups = groups_of(method, **train)
    return {name.rpartition(".")[2]: settings for name, settings in groups.items()}


def test_loraplus_speeds_lora_b_up_and_nothing_else():
    rates = rates_of("mixdora", learning_rate=0.01, loraplus_lr_ratio=16)
    assert {name: rate for name, (rate, _) in rates.items()} == {
        "lora_A": 0.01,
        "lora_B": 0.16,
        "lora_magnitude_vector": 0.01,
        "weight": 0.01,
    }


def test_routers_learn_at_a_rate_of_their_own():
    rates = rates_of("mixlora", learning_rate=0.01, router_lr_ratio=0.1, loraplus_lr_ratio=4)
    assert {name: rate for name, (rate, _) in rates.items()} == {
        "lora_A": 0.01,
        "lora_B": 0.04,
        "weight": pytest.approx(0.001),
    }


def test_a_rate_of_routers_is_refused_where_there_are_none():
    with pytest.raises(ValidationError, match="router_lr_ratio has no effect on LoRA, which has"):
        toy_config("a", ADAPTERS["lora"], router_lr_ratio=2)


def test_a_rate_of_b_is_refused_where_none_is_trained():
    with pytest.raises(ValidationError, match="loraplus_lr_ratio has no effect on VeRA, which"):
        toy_config("a", VeraConfig(), loraplus_lr_ratio=2)


def test_everything_decays_but_magnitudes():
    rates = rates_of("mixdora", weight_decay=0.1)
    assert {name for name, (_, decay) in rates.items() if decay == 0} == {"lora_magnitude_vector"}
    assert {decay for _, decay in rates.values()} == {0.1, 0.0}


def test_a_parameter_whose_name_ends_in_router_learns_at_the_routers_rate():
    adapter = tiny_host(configs={"a": ADAPTERS["lora"]}).adapter("a")
    own = adapter.own_modules.append(torch.nn.Module())[0]
    own.router = torch.nn.Parameter(torch.ones(2))
    own.rank_router = torch.nn.Linear(2, 2)
    own.router_bias = torch.nn.Parameter(torch.ones(2))
    own.router_scale = torch.nn.Parameter(torch.ones(2))
    names = {id(parameter): name for name, parameter in own.named_parameters()}
    config = OptimizerConfig(learning_rate=0.01, router_lr_ratio=3)
    ratios = {
        names[id(parameter)]: group["lr_ratio"]
        for group in parameter_groups(config, adapter)
        for parameter in group["params"]
        if id(parameter) in names
    }
    assert ratios == {
        "router": 3,
        "rank_router.weight": 3,
        "rank_router.bias": 30,
        "router_bias": 30,
        "router_scale": 1,
    }


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_experts_neither_learn_nor_decay(tmp_path, optimizer):
    config = toy_config("a", ADAPTERS["mixlora"], optimizer=optimizer, weight_decay=0.5)
    engine = toy_engine(tmp_path, [config], dtype=torch.float32)
    job = engine.jobs["a"]
    frozen = {name: weight for name, weight in job.parameters.items() if ".mlp." in name}
    for weight in frozen.values():
        weight.requires_grad_(False)
        weight.grad = torch.zeros_like(weight)  # of before it was frozen
    before = {name: weight.clone() for name, weight in frozen.items()}
    job.optimizer = build_optimizer(config.train, job.adapter)
    engine.step()
    assert all(torch.equal(frozen[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("method", ADAPTERS)
def test_every_weight_is_in_one_group(method):
    job = add_job(toy_host(), toy_config("a", ADAPTERS[method], loraplus_lr_ratio=2))
    grouped = [p for group in job.optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(job.parameters)
    assert {id(p) for p in grouped} == {id(p) for p in job.parameters.values()}


def test_first_group_has_the_jobs_own_learning_rate():
    job = add_job(toy_host(), toy_config("a", learning_rate=0.5, loraplus_lr_ratio=4))
    assert job.learning_rate == 0.5


def test_optimizer_args_reach_the_optimizer():
    config = toy_config("a", optimizer_args={"betas": [0.8, 0.9], "eps": 1e-6})
    defaults = add_job(toy_host(), config).optimizer.defaults
    assert (tuple(defaults["betas"]), defaults["eps"]) == ((0.8, 0.9), 1e-6)


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_steps_and_goes_on_after_a_save(tmp_path, name: OptimizerName):
    config = toy_config("a", ADAPTERS["mixdora"], optimizer=name, max_steps=3)
    engine = toy_engine(tmp_path, [config], dtype=torch.float32)
    before = engine.jobs["a"].adapter.tensors()
    before = {name: tensor.clone() for name, tensor in before.items()}
    engine.step()
    engine.save_state()
    after = engine.jobs["a"].adapter.tensors()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    again = toy_engine(tmp_path, [config], dtype=torch.float32)
    snapshot, _ = again._directory.checkpoints.newest()
    again.load_state(snapshot)
    for one in (engine, again):
        one.step()
    for own, other in zip(
        engine.jobs["a"].adapter.tensors().values(),
        again.jobs["a"].adapter.tensors().values(),
        strict=True,
    ):
        assert torch.equal(own, other)


def test_arguments_that_an_optimizer_does_not_take_are_an_error():
    config = toy_config("a", optimizer_args={"momentum": 0.9})
    with pytest.raises(ConfigError, match=r"job a: optimizer adamw .*momentum"):
        add_job(toy_host(), config)


def learning_rates(**train) -> list[float]:
    """Return a job's learning rate at each of its steps."""
    job = add_job(toy_host(), toy_config("a", **train))
    rates = []
    for _ in range(job.total_steps):
        rates.append(job.learning_rate)
        job.optimizer.step()
        if train["lr_scheduler"] not in SCHEDULERS_ON_METRIC:
            job.scheduler.step()
    return rates


def test_linear_schedule_warms_up_and_comes_down_to_zero():
    rates = learning_rates(lr_scheduler="linear", learning_rate=1, warmup_steps=2, max_steps=6)
    assert rates == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])


def test_warmup_ratio_is_a_share_of_all_steps():
    train = {"lr_scheduler": "constant_with_warmup", "learning_rate": 1, "max_steps": 8}
    assert learning_rates(warmup_ratio=0.25, **train) == pytest.approx([0, 0.5, *[1] * 6])


@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        *NEEDED_ARGS,
    ],
)
def test_every_scheduler_of_transformers_can_be_made(name):
    rates = learning_rates(
        lr_scheduler=name,
        lr_scheduler_args=NEEDED_ARGS.get(name, {}),
        learning_rate=0.5,
        max_steps=6,
    )
    assert len(rates) == 6
    assert max(rates) <= 0.5


def test_schedule_keeps_the_ratio_of_loraplus():
    job = add_job(
        toy_host(), toy_config("a", lr_scheduler="cosine", loraplus_lr_ratio=8, max_steps=6)
    )
    for _ in range(4):
        job.optimizer.step()
        job.scheduler.step()
        rates = [group["lr"] for group in job.optimizer.param_groups]
        assert rates[1] == pytest.approx(8 * rates[0])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("polynomial", {"lr_end": 1.0}),
        ("linear", {"power": 2}),
        ("cosine", {"power": 2}),
        ("inverse_sqrt", {"power": 2}),
        ("greedy", {"power": 2}),
        ("reduce_lr_on_plateau", {"power": 2}),
        ("cosine_with_min_lr", {}),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}),
        ("warmup_stable_decay", {}),
    ],
)
def test_arguments_that_a_scheduler_does_not_take_are_an_error(name, arguments):
    held_out = {"task": "skills", "validation_fraction": 0.5}
    needs = {"eval_steps": 1, "data": held_out} if name in SCHEDULERS_ON_METRIC else {}
    config = toy_config("a", lr_scheduler=name, lr_scheduler_args=arguments, **needs)
    job_config = config.model_copy(update={"train": config.train})
    host = toy_host()
    adapter = host.add("a", job_config.adapter)
    optimizer = build_optimizer(job_config.train, adapter)
    with pytest.raises(ConfigError, match=f"job a: lr_scheduler {name} can't be used"):
        build_scheduler(job_config.train, optimizer, 10, "min", "a")


REFUSED = [
    ({"optimizer_args": {"differentiable": True}}, "optimizer adamw"),
    ({"optimizer_args": {"fused": True, "foreach": True}}, "optimizer adamw"),
    ({"optimizer_args": {"betas": []}}, "optimizer adamw"),
    ({"optimizer_args": {"betas": [0.9, "x"]}}, "optimizer adamw"),
    ({"optimizer_args": {"eps": math.nan}}, "optimizer adamw"),
    ({"optimizer": "sgd", "optimizer_args": {"momentum": [1]}}, "optimizer sgd"),
    ({"optimizer": "sgd", "optimizer_args": {"momentum": 1e308}}, "optimizer sgd"),
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
def test_arguments_that_torch_refuses_are_told_before_anything_is_loaded(settings, what):
    config = toy_config("a", **settings)
    with pytest.raises(ConfigError, match=f"job a: {what} can't be used with .*_args"):
        rehearse(config.train, "a")


@pytest.mark.parametrize("name", get_args(LrScheduler))
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_optimizer_and_schedule_can_be_rehearsed(name, optimizer):
    needs = {"eval": [{"task": "skills"}], "eval_steps": 1} if name in SCHEDULERS_ON_METRIC else {}
    arguments = NEEDED_ARGS.get(name, {})
    for max_steps in (1, 7):
        config = toy_config(
            "a",
            optimizer=optimizer,
            lr_scheduler=name,
            lr_scheduler_args=arguments,
            max_steps=max_steps,
            **needs,
        )
        rehearse(config.train, "a")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_can_be_rehearsed(name):
    rehearse(toy_config("a", optimizer=name, learning_rate=1e200).train, "a")
