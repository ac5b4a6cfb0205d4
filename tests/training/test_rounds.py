from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from loraloom.errors import ConfigError, TrainingError
from loraloom.training.rounds import RoundRunner
from loraloom.training.run import train
from loraloom.training.step import fused
from loraloom.training.step.batch import MicroBatchLoss, lay_out
from loraloom.training.step.fused import add_gradients
from tests.training.running import assert_same_files, interrupted, resumed
from tests.training.saved import run_settings, save_inputs, write_run_file
from tests.training.step.test_fused import OBJECTIVES, assert_same, without_router_loss
from tests.training.toy import (
    ADAPTERS,
    PAD_ID,
    add_job,
    gradients_of,
    toy_config,
    toy_engine,
    toy_host,
    toy_set,
)


@pytest.fixture
def memory(monkeypatch):
    """Let forwards of more tokens than a limit end in the middle of their backward pass."""

    room = SimpleNamespace(max_tokens=10**9, failures=0)

    def limited(host, parts, pad_id):
        losses = add_gradients(host, parts, pad_id)
        if sum(lay_out(parts).computed_tokens) > room.max_tokens:
            room.failures += 1
            raise torch.OutOfMemoryError("injected")
        return losses

    monkeypatch.setattr(fused, "add_gradients", limited)
    return room


def one_step(*configs, sets=None, runner=None, **limits):
    """Run the first micro-batches of jobs, twice so that gradients add up."""
    host = toy_host()
    jobs = [add_job(host, config, (sets or {}).get(config.name), random=True) for config in configs]
    runner = runner or RoundRunner(host, PAD_ID, **limits)
    for _ in range(2):
        outcomes = runner.run([job.micro_batch() for job in jobs])
    return outcomes, [gradients_of(job) for job in jobs], runner


CONFIGS = {
    "sft": {},
    "packed": {"packing": True, "max_length": 20},
    "dpo": {"objective": OBJECTIVES["dpo"]},
    "packed ipo": {"objective": OBJECTIVES["ipo"], "packing": True, "max_length": 20},
}


@pytest.mark.parametrize(
    ("method", "kind"),
    [*(("lora", kind) for kind in CONFIGS), ("mixdora", "sft"), ("mixdora", "packed ipo")],
)
def test_a_step_in_parts_gives_the_losses_and_gradients_of_a_whole_one(memory, method, kind):
    adapter = without_router_loss(ADAPTERS[method])
    config = toy_config("a", adapter, batch_size=8, **CONFIGS[kind])
    (whole,), (expected,), _ = one_step(config)
    memory.max_tokens = 40
    (parts,), (gradients,), _ = one_step(config)
    assert memory.failures > 0
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.metrics == pytest.approx(whole.metrics, rel=1e-6)
    assert_same(gradients, expected, 1e-6)


def test_a_job_alone_is_not_parted_because_jobs_together_were():
    config = toy_config("a", ADAPTERS["mixlora"], batch_size=8)
    (whole,), (expected,), _ = one_step(config)
    _, (gradients,), _ = one_step(config, max_tokens=10)
    assert_same(gradients, expected, 1e-12)
    assert one_step(config, max_alone=10)[0][0].aux_loss != whole.aux_loss


def test_a_job_of_which_one_example_does_not_fit_fails_and_the_others_go_on(memory):
    memory.max_tokens = 12
    configs = [toy_config("long", batch_size=2), toy_config("short", seed=1, batch_size=4)]
    sets = {"long": toy_set(2, longest=40, seed=3), "short": toy_set(16)}
    (long, short), _, _ = one_step(*configs, sets=sets)
    assert isinstance(short, MicroBatchLoss)
    assert isinstance(long, TrainingError)
    assert "job long: an example of" in str(long)
    assert "lower train.max_length" in str(long)


def test_a_resumed_run_computes_its_steps_in_the_same_parts(memory, tmp_path):
    config = toy_config("a", ADAPTERS["dora"], batch_size=8, max_steps=6)
    memory.max_tokens = 40
    toy_engine(tmp_path / "unbroken", [config], dtype=torch.float32).run()
    interrupted(toy_engine(tmp_path / "broken", [config], dtype=torch.float32), after_round=3)
    failures, memory.max_tokens = memory.failures, 10**9  # the next machine has more
    resumed(tmp_path / "broken", [config], dtype=torch.float32).run()
    assert memory.failures == failures > 0
    assert_same_files(tmp_path / "broken", tmp_path / "unbroken", ["a"])


@pytest.fixture
def steps(monkeypatch) -> list[dict[str, int]]:
    """Collect the tokens of each job in each fused step."""
    found = []

    def spy(host, parts, pad_id):
        names = [part.adapter.name for part in parts]
        found.append(dict(zip(names, lay_out(parts).computed_tokens, strict=True)))
        return add_gradients(host, parts, pad_id)

    monkeypatch.setattr(fused, "add_gradients", spy)
    return found


def test_shares_of_computed_tokens_follow_priorities(tmp_path, steps):
    priorities = {"a": 1, "b": 2, "c": 0.5}
    configs = [
        toy_config(name, priority=priority, max_steps=100) for name, priority in priorities.items()
    ]
    sets = {name: toy_set(seed=seed, longest=6 + 3 * seed) for seed, name in enumerate(priorities)}
    engine = toy_engine(tmp_path, configs, sets, max_tokens_per_step=48)
    for _ in range(30):
        engine.step()
    computed = Counter()
    for step in steps:
        computed.update(step)
    levels = [computed[name] / priority for name, priority in priorities.items()]
    assert max(levels) - min(levels) <= 2 * 48
    assert min(levels) > 5 * 48


def test_a_job_that_joins_begins_at_the_least_level(tmp_path):
    engine = toy_engine(tmp_path, [toy_config("a", max_steps=9)], max_tokens_per_step=48)
    engine.step()
    engine.add(add_job(engine.host, toy_config("b")))
    assert engine.jobs["b"].position.level == engine.jobs["a"].position.level > 0
    engine.save_state()
    again = toy_engine(tmp_path, [toy_config("b"), toy_config("c")], max_tokens_per_step=48)
    again.begin(again.directory.checkpoints.newest()[0])
    assert again.jobs["c"].position.level == again.jobs["b"].position.level > 0


def test_a_memory_limit_on_a_cpu_is_refused_before_anything_is_written(tmp_path):
    settings = run_settings(save_inputs(tmp_path), tmp_path / "out")
    path = write_run_file(tmp_path / "run.yaml", {**settings, "memory_limit": "20GB"})
    with pytest.raises(ConfigError, match=r"memory_limit requires an accelerator .* device cpu"):
        train(path)
    assert not (tmp_path / "out").exists()
