from __future__ import annotations

from collections import Counter

import pytest

from loraloom.errors import ConfigError
from loraloom.training import rounds
from loraloom.training.step.batch import lay_out
from loraloom.training.step.fused import forward_backward
from tests.tiny import relative_error
from tests.training.running import assert_same_files, interrupted, matrix, resumed, trained_weights
from tests.training.toy import add_job, toy_config, toy_engine, toy_pair_set, toy_set

LIMIT = 80


@pytest.fixture
def steps(monkeypatch) -> list[dict[str, int]]:
    """Collect the tokens of each job in each fused step."""
    found = []

    def spy(host, parts, pad_id):
        names = [part.adapter.name for part in parts]
        found.append(dict(zip(names, lay_out(parts).computed_tokens, strict=True)))
        return forward_backward(host, parts, pad_id)

    monkeypatch.setattr(rounds, "forward_backward", spy)
    return found


def test_jobs_in_bounded_steps_train_as_they_do_alone(tmp_path, steps):
    configs, sets = matrix()
    bounded = toy_engine(tmp_path / "all", configs, sets, max_tokens_per_step=LIMIT)
    together = trained_weights(bounded)
    assert max(sum(step.values()) for step in steps) <= LIMIT
    assert len({tuple(step) for step in steps}) > 2, "steps should differ in their jobs"
    for config in configs:
        alone = trained_weights(toy_engine(tmp_path / config.name, [config], sets))
        for name, weight in alone[config.name].items():
            assert relative_error(together[config.name][name], weight) < 1e-9, name


def test_a_resumed_run_chooses_the_same_steps(tmp_path):
    configs, sets = matrix(max_steps=8)
    options = {"max_tokens_per_step": LIMIT}
    toy_engine(tmp_path / "unbroken", configs, sets, **options).run()
    broken = toy_engine(tmp_path / "broken", configs, sets, **options)
    interrupted(broken, after_round=11)
    resumed(tmp_path / "broken", configs, sets, **options).run()
    assert_same_files(tmp_path / "broken", tmp_path / "unbroken", list(sets))


def test_shares_of_computed_tokens_follow_priorities(tmp_path, steps):
    priorities = {"a": 1, "b": 2, "c": 0.5}
    configs = [
        toy_config(name, priority=priority, max_steps=100) for name, priority in priorities.items()
    ]
    sets = {name: toy_set(seed=seed, longest=6 + 3 * seed) for seed, name in enumerate(priorities)}
    engine = toy_engine(tmp_path, configs, sets, max_tokens_per_step=48)
    for _ in range(60):
        engine.step()
    computed = Counter()
    for step in steps:
        computed.update(step)
    levels = [computed[name] / priority for name, priority in priorities.items()]
    assert max(levels) - min(levels) <= 2 * 48
    assert min(levels) > 5 * 48


def test_a_job_that_joins_is_level_with_the_one_that_waits_longest(tmp_path, steps):
    engine = toy_engine(tmp_path, [toy_config("a"), toy_config("b")], max_tokens_per_step=36)
    for _ in range(3):
        engine.step()
    engine.add(add_job(engine.host, toy_config("c")))
    a, b, c = (engine.jobs[name].scheduler_pass for name in "abc")
    assert c == min(a, b) > 0


def test_without_a_bound_all_jobs_take_part(tmp_path, steps):
    toy_engine(tmp_path, [toy_config("a"), toy_config("b")]).step()
    assert list(steps[0]) == ["a", "b"]


def test_a_job_that_fits_no_step_is_refused_with_the_number_that_it_needs(tmp_path):
    sets = {"big": toy_set(longest=9)}
    longest = max(len(example.input_ids) for example in sets["big"].examples)
    with pytest.raises(
        ConfigError, match=rf"job big: max_tokens_per_step must hold .* {4 * longest} tokens"
    ):
        toy_engine(tmp_path, [toy_config("big")], sets, max_tokens_per_step=4 * longest - 1)
    toy_engine(tmp_path, [toy_config("big")], sets, max_tokens_per_step=4 * longest)


def test_a_packed_pair_needs_its_own_tokens_only(tmp_path):
    sets = {"pairs": toy_pair_set()}
    needed = max(sum(len(row.input_ids) for row in pair.rows) for pair in sets["pairs"].examples)
    config = toy_config("pairs", objective={"name": "dpo"}, packing=True, batch_size=1)
    engine = toy_engine(tmp_path, [config], sets, max_tokens_per_step=needed)
    engine.step()
    with pytest.raises(ConfigError, match=rf"longest micro-batch, which has {needed} tokens"):
        toy_engine(tmp_path, [config], sets, max_tokens_per_step=needed - 1)


def test_a_job_that_fits_no_step_can_not_join(tmp_path):
    engine = toy_engine(tmp_path, [toy_config("a")], max_tokens_per_step=36)
    with pytest.raises(ConfigError, match="job big: max_tokens_per_step"):
        engine.add(add_job(engine.host, toy_config("big", batch_size=8)))
    assert list(engine.host.adapters) == ["a"]


def test_a_job_that_can_not_join_leaves_earlier_results_alone(tmp_path):
    engine = toy_engine(tmp_path, [toy_config("a")], max_tokens_per_step=36)
    (tmp_path / "big").mkdir()
    (tmp_path / "big/result.json").write_text("{}")
    with pytest.raises(ConfigError, match="job big: max_tokens_per_step"):
        engine.add(add_job(engine.host, toy_config("big", batch_size=8)), overwrite=True)
    assert (tmp_path / "big/result.json").exists()


def test_jobs_that_the_checkpoint_does_not_know_do_not_get_ahead(tmp_path):
    engine = toy_engine(tmp_path, [toy_config("a")], max_tokens_per_step=1000)
    engine.step()
    engine.save_state()
    again = resumed(tmp_path, [toy_config("a"), toy_config("b")], max_tokens_per_step=1000)
    a, b = (again.jobs[name].scheduler_pass for name in "ab")
    assert a == b == engine.jobs["a"].scheduler_pass > 0
