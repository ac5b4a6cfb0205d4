"""Jobs and tools on the pretend device: the CPU's weights, files, merges and combinations."""

import pytest
import torch

import loraloom
from loraloom.training.builder import JobBuilder
from loraloom.training.engine import Engine
from loraloom.training.reporting import Progress
from loraloom.training.run_directory import RunDirectory
from loraloom.training.settings import RunConfig
from tests.device.hosts import assert_same, hosts_on
from tests.device.pretend import on_cpu
from tests.tiny import ALL_METHODS, tiny_ids, tiny_model
from tests.training.toy import ADAPTERS, add_job, toy_config, toy_set, toy_tokenizer

CPU = torch.device("cpu")


def engine_on(
    device, directory, names=tuple(ADAPTERS), dtype=torch.float32, save_steps=2
) -> Engine:
    host = loraloom.attach(tiny_model(dtype=dtype).to(device))
    settings = {"max_steps": 4, "eval_steps": 2, "optimizer": "sgd"}
    settings["save_steps"] = save_steps
    data = {"task": "skills", "validation_fraction": 0.2}
    configs = [toy_config(name, ADAPTERS[name], data=data, **settings) for name in names]
    jobs = [add_job(host, config, toy_set(num_validation=4)) for config in configs]
    run = RunConfig(base_model="tiny", output_dir=directory)
    builder = JobBuilder(host, toy_tokenizer())
    return Engine(host, jobs, builder, RunDirectory(directory), Progress(), run)


def weights_of(engine):
    return {
        f"{job.name}.{name}": on_cpu(weight.detach())
        for job in engine.jobs.values()
        for name, weight in job.learner.parameters.items()
    }


def test_a_run_trains_evaluates_and_resumes_as_on_the_cpu(accelerator, tmp_path):
    names = ["lora", "mixlora"]
    weights = []
    for device in (accelerator.device, CPU):
        directory = tmp_path / device.type
        first = engine_on(device, directory, names)
        first.begin(None)
        for _ in range(2):
            first.step()
        first.save_state()
        checkpoint, _ = RunDirectory(directory).checkpoints.newest()
        second = engine_on(device, directory, names)
        second.begin(checkpoint)
        results = second.run()
        assert [result.status for result in results] == ["finished"] * len(names)
        weights.append(weights_of(second))
    assert_same(weights[0], weights[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_steady_step_of_any_number_of_jobs_reads_once(accelerator, tmp_path, dtype):
    for names in (("lora", "mixlora"), tuple(ADAPTERS)):
        # A step that saves an adapter reads it.
        engine = engine_on(accelerator.device, tmp_path, names, dtype, save_steps=4)
        engine.begin(None)
        engine.step()
        with accelerator.step(f"{len(names)} jobs"):
            engine.step()
    two, four = accelerator.counts("2 jobs"), accelerator.counts("4 jobs")
    # One of the reads is that of transformers, which looks for packed rows.
    assert two == {"read": 2, "upload": 4}
    assert four == {"read": 2, "upload": 4}


def test_the_check_of_finite_weights_reads_once_a_job(accelerator, tmp_path):
    engine = engine_on(accelerator.device, tmp_path)
    for job in engine.jobs.values():
        with accelerator.step(job.name):
            assert job.find_fault_of_weights() is None
        assert accelerator.counts(job.name) == {"read": 1}


def test_a_weight_that_is_not_finite_is_found(accelerator, tmp_path):
    engine = engine_on(accelerator.device, tmp_path)
    job = engine.jobs["lora"]
    with torch.no_grad():
        list(job.learner.parameters.values())[-1].fill_(torch.nan)
    assert "weights must be finite" in str(job.find_fault_of_weights())


@pytest.mark.parametrize("name", list(ALL_METHODS))
def test_a_saved_adapter_loads_with_the_same_numbers(accelerator, tmp_path, name):
    host, cpu_host = hosts_on(accelerator.device, {name: ALL_METHODS[name]})
    host.save(name, tmp_path)
    host.load("again", tmp_path)
    assert_same(on_cpu(dict(host.adapters["again"].tensors())), cpu_host.adapters[name].tensors())


def test_a_combination_is_the_cpus(accelerator):
    configs = {"a": ALL_METHODS["lora"], "b": ALL_METHODS["lora"]}
    logits = []
    for host in hosts_on(accelerator.device, configs):
        host.combine(["a", "b"], [0.5, 0.5], name="both")
        output = host(tiny_ids(2).to(host.device), adapters=["both"] * 2)
        logits.append({"logits": on_cpu(output.logits.detach())})
    assert_same(*logits)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_a_merged_adapter_answers_as_on_the_cpu(accelerator, name):
    logits = []
    for host in hosts_on(accelerator.device, {name: ALL_METHODS[name]}):
        host.merge(name)
        merged = host(tiny_ids(2).to(host.device)).logits
        host.unmerge(name)
        restored = host(tiny_ids(2).to(host.device)).logits
        logits.append(on_cpu({"merged": merged.detach(), "restored": restored.detach()}))
    assert_same(*logits)
