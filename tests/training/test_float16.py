"""Jobs on a base model in float16: each scales its own loss."""

from collections.abc import Mapping

import torch

from loraloom.training.client import TrainingClient
from loraloom.training.engine import Engine
from loraloom.training.step.batch import MicroBatchLoss
from tests.training.running import interrupted, read_metrics, resumed, trained_weights
from tests.training.toy import (
    ADAPTERS,
    accept,
    add_job,
    toy_config,
    toy_host,
    toy_tokenizer,
    weights_of,
)
from tests.training.toy import toy_engine as engine_of

TOO_MUCH = 2.0**40
"""A scale at which the tiny model's gradients overflow."""


def toy_engine(directory, names=("lora", "mixlora"), scales: Mapping[str, float] | None = None):
    configs = [toy_config(name, ADAPTERS[name], seed=1, max_steps=4) for name in names]
    engine = engine_of(directory, configs, dtype=torch.float16)
    for name, scale in (scales or {}).items():
        engine.jobs[name].learner.loss_scale.scale = scale
    return engine


def test_the_overflow_of_one_job_leaves_its_neighbour_alone(tmp_path):
    expected = trained_weights(toy_engine(tmp_path / "calm"))["mixlora"]
    wild = toy_engine(tmp_path / "wild", scales={"lora": TOO_MUCH})
    jobs = dict(wild.jobs)
    start = {name: p.detach().clone() for name, p in jobs["lora"].learner.parameters.items()}
    weights = trained_weights(wild)
    assert all(torch.equal(weights["mixlora"][name], expected[name]) for name in expected)
    assert all(torch.equal(weights["lora"][name], start[name]) for name in start)
    lora_scale = {"scale": TOO_MUCH / 16, "sound_steps": 0, "skipped_steps": 4}
    assert jobs["lora"].learner.state_dict()["loss_scale"] == lora_scale
    mixlora_scale = {"scale": 2.0**16, "sound_steps": 4, "skipped_steps": 0}
    assert jobs["mixlora"].learner.state_dict()["loss_scale"] == mixlora_scale
    assert jobs["lora"].scheduler.last_epoch == 0
    lora, mixlora = (read_metrics(tmp_path / "wild" / name) for name in jobs)
    assert [line["skipped_steps"] for line in lora] == [1, 2, 3]
    assert [line["loss_scale"] for line in lora] == [TOO_MUCH / 2**n for n in (1, 2, 3)]
    assert all("grad_norm" not in line for line in lora)
    assert all((line["skipped_steps"], line["grad_norm"] > 0) == (0, True) for line in mixlora)


def test_a_skipped_step_counts_in_a_job_and_in_a_loop_of_ones_own():
    host = toy_host(dtype=torch.float16)
    client = TrainingClient(host, toy_tokenizer(), "client", ADAPTERS["lora"])
    job = add_job(host, toy_config("job", ADAPTERS["lora"]))
    before = weights_of(client)
    for parameter in (*job.learner.parameters.values(), *client.parameters.values()):
        parameter.grad = torch.full_like(parameter, torch.inf)
    report = accept(job, MicroBatchLoss(1.0))
    step = client.optim_step()
    assert (report["step"], report["skipped_steps"], job.scheduler.last_epoch) == (1, 1, 0)
    assert (step.step, step.is_skipped, client.step) == (1, True, 1)
    assert all(torch.equal(p, before[name]) for name, p in client.parameters.items())


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
    assert other.learner.state_dict()["loss_scale"] == job.learner.state_dict()["loss_scale"]
    assert all(torch.equal(weights["lora"][n], w) for n, w in expected["lora"].items())
