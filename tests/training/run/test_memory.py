from __future__ import annotations

import pytest
import torch

from loraloom.config.loading import load_run_config
from loraloom.errors import ConfigError
from loraloom.training.run import memory
from loraloom.training.run.memory import (
    check_memory,
    kept_bytes,
    predict_memory,
    step_rows,
    watch_forwards,
)
from loraloom.training.run.run import train
from tests.training.running import trained_weights
from tests.training.saved import run_settings, save_inputs, write_run_file
from tests.training.toy import (
    ADAPTERS,
    add_job,
    toy_config,
    toy_engine,
    toy_host,
    toy_set,
)


def predict(*configs, max_tokens_per_step=None, sets=None):
    host = toy_host()
    jobs = [add_job(host, config, (sets or {}).get(config.name)) for config in configs]
    return predict_memory(host, jobs, max_tokens_per_step)


def kept(adapter, rows: int, length: int) -> int:
    """Count what a whole forward keeps for its backward pass."""
    host = toy_host()
    job = add_job(host, toy_config("a", adapter))
    return kept_bytes(host, job, rows, length)


@pytest.mark.parametrize("method", ADAPTERS)
def test_activations_of_a_large_forward_follow_from_small_ones(method):
    host = toy_host()
    cost = watch_forwards(host, [add_job(host, toy_config("a", ADAPTERS[method]))])[0]
    predicted = cost.constant + 9 * cost.per_row(60)
    assert predicted == pytest.approx(kept(ADAPTERS[method], 9, 60), rel=0.02)


def test_looking_leaves_no_gradient():
    host = toy_host()
    job = add_job(host, toy_config("a", ADAPTERS["mixlora"]))
    predict_memory(host, [job])
    assert all(parameter.grad is None for parameter in job.parameters.values())


def test_the_largest_micro_batch_has_the_longest_examples():
    config = toy_config("a", batch_size=8, micro_batch_size=4)
    rows, length = step_rows(add_job(toy_host(), config, toy_set(32, longest=40)))
    longest = max(len(example.input_ids) for example in toy_set(32, longest=40).examples)
    assert (rows, length) == (4, longest)


def test_packed_rows_are_fewer():
    config = toy_config("a", batch_size=16, packing=True, max_length=60)
    rows, length = step_rows(add_job(toy_host(), config, toy_set(16)))
    assert rows * length < 16 * 9


def test_parts_add_up_and_weights_are_counted():
    prediction = predict(toy_config("a", ADAPTERS["lora"]))
    host = toy_host()
    adapter = add_job(host, toy_config("a", ADAPTERS["lora"])).adapter
    own = 8 * sum(parameter.numel() for parameter in adapter.parameters())
    assert prediction.adapters == own
    assert prediction.learning == 3 * own
    assert prediction.base_model >= 8 * sum(p.numel() for p in host.model.parameters())
    assert prediction.total == prediction.loaded + 3 * own + prediction.activations + (
        prediction.loss
    )


def test_jobs_and_their_rows_add_up_and_checkpointing_takes_less():
    one = toy_config("a", ADAPTERS["mixdora"], batch_size=16)
    two = predict(one, toy_config("b", ADAPTERS["lora"], batch_size=16))
    assert two.rows == 32
    assert two.activations > predict(one).activations
    less = toy_config("a", ADAPTERS["mixdora"], batch_size=16, gradient_checkpointing=True)
    assert predict(less).activations < predict(one).activations


def test_a_bound_of_tokens_bounds_the_step():
    configs = [toy_config(name, ADAPTERS["lora"], batch_size=8) for name in "abcd"]
    bounded = predict(*configs, max_tokens_per_step=150)
    assert bounded.rows == 16  # of nine tokens
    assert bounded.activations < predict(*configs).activations
    assert bounded.learning == predict(*configs).learning
    assert predict(*configs, max_tokens_per_step=1).rows == 8  # a job is never cut


def test_a_step_that_does_not_fit_is_refused_with_the_numbers():
    prediction = predict(toy_config("a", ADAPTERS["lora"]))
    check_memory(prediction, prediction.total, torch.device("cpu"))
    with pytest.raises(ConfigError) as error:
        check_memory(prediction, prediction.total - 1, torch.device("cpu"))
    for text in ("(memory_limit)", "4 rows of 9 tokens", "base model", "activations", "lower "):
        assert text in str(error.value)


def test_without_a_limit_it_is_what_the_device_has(monkeypatch):
    prediction = predict(toy_config("a", ADAPTERS["lora"]))
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10)
    with pytest.raises(ConfigError, match="what cpu has"):
        check_memory(prediction, None, torch.device("cpu"))
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    check_memory(prediction, None, torch.device("cpu"))


def test_a_run_is_refused_before_anything_is_written(tmp_path):
    settings = run_settings(save_inputs(tmp_path), tmp_path / "out")
    path = write_run_file(tmp_path / "run.yaml", {**settings, "memory_limit": "10kB"})
    with pytest.raises(ConfigError, match=r"must fit into 0.00 GB \(memory_limit\)"):
        train(path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", ["lots", "20 elephants", -5])
def test_a_limit_that_is_no_size_is_refused(tmp_path, given):
    settings = run_settings(tmp_path, tmp_path / "out")
    path = write_run_file(tmp_path / "run.yaml", {**settings, "memory_limit": given})
    with pytest.raises(ConfigError, match="memory_limit must be a number of bytes, or a text like"):
        load_run_config(path)


def test_a_job_that_joins_must_fit_as_well(tmp_path):
    alone, config = toy_engine(tmp_path / "alone", [toy_config("a")]), toy_config("b")
    limit = predict_memory(alone.host, list(alone.jobs.values())).total
    engine = toy_engine(tmp_path / "out", [toy_config("a")], memory_limit=limit)
    engine.step()
    with pytest.raises(ConfigError, match=r"job b: a step must fit into .* \(memory_limit\)"):
        engine.add(add_job(engine.host, config))
    assert list(engine.host.adapters) == ["a"]
    assert not (tmp_path / "out/b").exists()
    alone.step()
    expected = trained_weights(alone)["a"]
    assert all(
        torch.equal(weights, expected[name])
        for name, weights in trained_weights(engine)["a"].items()
    )


def test_a_job_that_can_not_be_looked_at_is_off_the_host(tmp_path, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no room to look")

    engine = toy_engine(tmp_path, [toy_config("a")], memory_limit=10**12)
    monkeypatch.setattr("loraloom.training.run.engine.predict_memory", fail)
    with pytest.raises(torch.OutOfMemoryError):
        engine.add(add_job(engine.host, toy_config("b")))
    assert list(engine.host.adapters) == ["a"]
