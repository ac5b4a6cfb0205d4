"""Jobs on a base model in float16: each scales its own loss."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import Parameter
from torch.nn.functional import cross_entropy

from loraloom.training.client import TrainingClient
from loraloom.training.engine import Engine
from loraloom.training.settings import OptimizerConfig
from loraloom.training.step import optimizers
from loraloom.training.step.optimizers import LossScale
from tests.tiny import randomise, relative_error
from tests.training.running import interrupted, read_metrics, resumed, trained_weights
from tests.training.toy import (
    ADAPTERS,
    add_job,
    padded,
    toy_config,
    toy_examples,
    toy_host,
    toy_tokenizer,
)
from tests.training.toy import toy_engine as engine_of

TOO_MUCH = 2.0**40
"""A scale at which the tiny model's gradients overflow."""


def toy_engine(directory, names=("lora", "mixlora"), scales: Mapping[str, float] | None = None):
    configs = [toy_config(name, ADAPTERS[name], seed=1, max_steps=4) for name in names]
    engine = engine_of(directory, configs, dtype=torch.float16)
    for name, scale in (scales or {}).items():
        engine.jobs[name].loss_scale.scale = scale
    return engine


def test_the_scale_moves_and_steps_are_skipped_as_torch_does_it(monkeypatch):
    monkeypatch.setattr(optimizers, "GROWTH_INTERVAL", 3)
    parameter = Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    ours = LossScale(2.0**10)
    generator = torch.Generator().manual_seed(0)
    skips = 0
    for _ in range(60):
        gradient = torch.randn(3, generator=generator)
        overflows = float(torch.rand((), generator=generator)) < 0.25
        theirs.scale(torch.tensor(1.0))
        assert theirs.get_scale() == ours.scale
        scaled = torch.full((3,), torch.inf) if overflows else gradient * ours.scale
        parameter.grad = scaled.clone()
        theirs.unscale_(optimizer)
        expected, parameter.grad = parameter.grad, scaled.clone()
        ours.unscale([parameter])
        assert torch.equal(parameter.grad, expected)
        before = theirs.get_scale()
        theirs.step(optimizer)
        theirs.update()
        is_taken = ours.takes(float(parameter.grad.norm()))
        skips += not is_taken
        assert is_taken == (theirs.get_scale() >= before)
    assert 0 < ours.skipped_steps == skips < 60


def dense_weights(config, num_steps: int) -> tuple[dict[str, torch.Tensor], int]:
    """Train an adapter with torch's scaler and plain cross entropy; tell the steps left out too."""
    host = toy_host(torch.float16)
    job = add_job(host, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=TOO_MUCH)
    skipped = 0
    for step in range(num_steps):
        input_ids, mask, labels = padded(job.order.window(step).examples)
        logits = host(input_ids, mask, [config.name] * len(input_ids), training=True).logits
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        scaler.scale(loss).backward()
        scaler.unscale_(job.optimizer)
        torch.nn.utils.clip_grad_norm_(job.parameters.values(), 1.0)
        before = scaler.get_scale()
        scaler.step(job.optimizer)
        scaler.update()
        skipped += scaler.get_scale() < before
        job.optimizer.zero_grad()
    return {name: p.detach() for name, p in job.parameters.items()}, skipped


def test_a_job_learns_what_a_plain_loop_with_torchs_scaler_learns(tmp_path):
    adapter = ADAPTERS["lora"].model_copy(update={"dropout": 0.0})
    config = toy_config("lora", adapter, seed=1, max_steps=40)
    engine = engine_of(tmp_path, [config], dtype=torch.float16)
    job = engine.jobs["lora"]
    job.loss_scale.scale = TOO_MUCH
    start = {name: p.detach().clone() for name, p in job.parameters.items()}
    weights = trained_weights(engine)["lora"]
    expected, skipped = dense_weights(config, 40)
    assert 3 < job.loss_scale.skipped_steps < 30
    assert abs(job.loss_scale.skipped_steps - skipped) <= 1  # rounding decides at the edge
    if job.loss_scale.skipped_steps == skipped:
        moved = {name: weights[name] - start[name] for name in weights}
        wanted = {name: expected[name] - start[name] for name in weights}
        for name in moved:
            assert relative_error(moved[name], wanted[name]) < 0.1, name


def test_the_overflow_of_one_job_leaves_its_neighbour_alone(tmp_path):
    calm = toy_engine(tmp_path / "calm")
    expected = trained_weights(calm)["mixlora"]
    wild = toy_engine(tmp_path / "wild", scales={"lora": TOO_MUCH})
    jobs = dict(wild.jobs)
    start = {name: p.detach().clone() for name, p in jobs["lora"].parameters.items()}
    weights = trained_weights(wild)
    assert all(torch.equal(weights["mixlora"][name], expected[name]) for name in expected)
    assert all(torch.equal(weights["lora"][name], start[name]) for name in start)
    assert (jobs["lora"].loss_scale, jobs["mixlora"].loss_scale) == (
        LossScale(TOO_MUCH / 16, 0, 4),
        LossScale(2.0**16, 4, 0),
    )
    assert jobs["lora"].scheduler.last_epoch == 0
    lora, mixlora = (read_metrics(tmp_path / "wild" / name) for name in jobs)
    assert [line["skipped_steps"] for line in lora] == [1, 2, 3]
    assert [line["loss_scale"] for line in lora] == [TOO_MUCH / 2**n for n in (1, 2, 3)]
    assert all("grad_norm" not in line for line in lora)
    assert all((line["skipped_steps"], line["grad_norm"] > 0) == (0, True) for line in mixlora)


def test_a_job_that_made_none_of_its_steps_has_failed(tmp_path):
    (result,) = toy_engine(tmp_path, ("lora",), scales={"lora": TOO_MUCH}).run()
    assert result.status == "failed"
    assert result.error == (
        "job lora: all of its 4 steps were skipped, as gradients overflow float16; the last one "
        f"halved the loss scale to {TOO_MUCH / 16:g}; train longer, or in bfloat16"
    )


def test_a_resumed_run_has_the_scale_it_had(tmp_path):
    scales = {"lora": TOO_MUCH / 2**8}
    whole = toy_engine(tmp_path / "whole", ("lora",), scales)
    job = whole.jobs["lora"]
    expected = trained_weights(whole)
    broken: Engine = toy_engine(tmp_path / "broken", ("lora",), scales)
    configs = [broken.jobs["lora"].config]
    interrupted(broken, after_round=2)
    engine = resumed(tmp_path / "broken", configs, dtype=torch.float16)
    other = engine.jobs["lora"]
    weights = trained_weights(engine)
    assert other.loss_scale == job.loss_scale
    assert all(torch.equal(weights["lora"][n], w) for n, w in expected["lora"].items())


def test_gradients_that_overflow_at_any_scale_end_the_job(tmp_path):
    engine = toy_engine(tmp_path, ("lora",), {"lora": 1.0})
    for parameter in engine.jobs["lora"].parameters.values():
        parameter.register_hook(lambda gradient: gradient * torch.inf)
    (result,) = engine.run()
    assert "step 1: gradients overflow float16 even without scaling; its last good" in result.error


def test_a_client_skips_a_step_and_goes_on(tmp_path):
    host = toy_host(torch.float16)
    sgd = OptimizerConfig(optimizer="sgd", learning_rate=0.1)
    client = TrainingClient(host, toy_tokenizer(), "a", ADAPTERS["lora"], sgd)
    randomise(client.adapter)
    data = toy_examples(2)
    client._loss_scale.scale = TOO_MUCH
    client.forward_backward(data)
    before = {name: p.detach().clone() for name, p in client.parameters.items()}
    skipped = client.optim_step()
    assert (skipped.step, skipped.is_skipped) == (0, True)
    assert all(torch.equal(before[name], p) for name, p in client.parameters.items())
    client.save_state(tmp_path)
    client._loss_scale.scale = 2.0
    client.load_state(tmp_path)
    assert client._loss_scale == LossScale(TOO_MUCH / 2, 0, 1)
    client._loss_scale.scale = 2.0**10
    client.forward_backward(data)
    made = client.optim_step()
    assert (made.step, made.is_skipped) == (1, False)
