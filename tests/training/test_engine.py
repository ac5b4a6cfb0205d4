import json
from pathlib import Path

import pytest
import torch

from loraloom import RoutedConfig
from loraloom.errors import ConfigError
from loraloom.formats.files import read_adapter
from loraloom.routing import tally
from loraloom.training import builder
from loraloom.training import job as job_module
from loraloom.training.checkpoints import CheckpointStore
from loraloom.training.run_directory import RunDirectory
from tests.tiny import ON_EXPERTS
from tests.training.running import (
    assert_same_files,
    assert_same_metrics,
    intermediate_files,
    interrupted,
    matrix,
    read_metrics,
    resumed,
    trained_weights,
)
from tests.training.step.test_fused import assert_same
from tests.training.toy import (
    ADAPTERS,
    add_job,
    read_result,
    toy_config,
    toy_engine,
    toy_set,
    weights_of,
)


def test_a_job_that_is_done_leaves_and_the_others_go_on(tmp_path):
    configs = [toy_config("short", max_steps=2), toy_config("long", lr_ratios={"lora_A": 0})]
    engine = toy_engine(tmp_path, configs)
    frozen = [p for n, p in engine.jobs["long"].adapter.named_parameters() if "lora_A" in n]
    short, long = engine.run()
    assert (short.steps, long.steps, engine.round) == (2, 4, 4)
    assert short.num_parameters - long.num_parameters == sum(map(torch.numel, frozen)) > 0
    assert engine.host.adapters == {}


@pytest.mark.parametrize(("family", "max_steps"), [("qwen3_moe", 20), ("deepseek_v3", 3)])
def test_eight_adapters_on_experts_learn_together_what_each_learns_alone(
    family, max_steps, tmp_path
):
    configs = []
    names = ("lora", "rslora", "dora", "shared", "some", "mixlora", "mixdora", "beside")
    for number, name in enumerate(names):
        settings = {"optimizer": "adamw", "weight_decay": 0.01, "max_steps": max_steps}
        configs.append(toy_config(name, ON_EXPERTS[name], number, learning_rate=1e-3, **settings))
    together = toy_engine(tmp_path / "together", configs, family=family)
    jobs = dict(together.jobs)
    together.run()
    for config in configs:
        alone = toy_engine(tmp_path / config.name, [config], family=family)
        (job,) = alone.jobs.values()
        alone.run()
        for name, weight in weights_of(job).items():
            difference = (weights_of(jobs[config.name])[name] - weight).abs().max()
            assert difference < 1e-6, (config.name, name)


@pytest.mark.parametrize("eval_on_start", [True, False])
def test_a_job_may_be_measured_before_its_first_step(tmp_path, eval_on_start):
    data = {"task": "skills", "validation_fraction": 0.5}
    config = toy_config("a", data=data, max_steps=2, eval_on_start=eval_on_start)
    toy_engine(tmp_path, [config], {"a": toy_set(count=4, num_validation=3)}).run()
    steps = [line["step"] for line in read_metrics(tmp_path / "a") if "eval/loss" in line]
    assert steps == ([0, 2] if eval_on_start else [2])


def test_final_files_are_the_best_weights_and_both_are_kept(tmp_path, monkeypatch):
    config = toy_config("a", max_steps=3, eval_steps=1, eval=[{"task": "skills", "limit": 5}])
    accuracies = iter([0.2, 0.6, 0.4])
    monkeypatch.setattr(builder, "score_accuracy", lambda *_: {"a": next(accuracies)})
    engine = toy_engine(tmp_path, [config], dtype=torch.float32)
    engine.jobs["a"].questions[config.eval[0]] = []
    job, base = engine.jobs["a"], engine.host.base
    weights_after = {}
    step = engine.step

    def stepping():
        step()
        tensors = job.adapter.tensors().items()
        weights_after[job.position.step] = {name: tensor.clone() for name, tensor in tensors}

    engine.step = stepping
    (result,) = engine.run()
    assert result.weights == "best"
    assert result.best == {"metric": "eval/skills/accuracy", "value": 0.6, "step": 2}
    assert result.metrics == {"eval/skills/accuracy": 0.6}
    assert result.last_metrics == {"eval/skills/accuracy": 0.4}

    directory = RunDirectory(tmp_path)
    for path, of_step in (
        (directory.job("a"), 2),
        (directory.job("a") / "checkpoints/last", 3),
    ):
        _, tensors = read_adapter(path, base)
        expected = weights_after[of_step]
        assert all(torch.equal(tensors[name], own) for name, own in expected.items()), path


def test_early_stopping_waits_for_its_patience(tmp_path, monkeypatch):
    stopping = {"metric": "eval/skills/accuracy", "patience": 2}
    task = [{"task": "skills", "limit": 5}]
    config = toy_config("a", max_steps=20, eval_steps=2, early_stopping=stopping, eval=task)
    accuracies = iter([0.2, 0.5, 0.5, 0.4])
    asked = []

    def score(host, tokenizer, questions, adapters):
        asked.append((list(questions), list(adapters)))
        return {"a": next(accuracies)}

    monkeypatch.setattr(builder, "score_accuracy", score)
    engine = toy_engine(tmp_path, [config])
    engine.jobs["a"].questions[config.eval[0]] = []
    (result,) = engine.run()
    assert (result.status, result.steps) == ("stopped early", 8)
    assert result.best == {"metric": "eval/skills/accuracy", "value": 0.5, "step": 4}
    assert asked == [([], ["a"])] * 4


def poison(job, step: int) -> None:
    """Spoil an adapter's weights when its job comes to a step."""
    take = job.micro_batch

    def poisoned():
        if job.position.step == step - 1:
            with torch.no_grad():
                job.learner.parameters[next(iter(job.learner.parameters))].fill_(float("nan"))
        return take()

    job.micro_batch = poisoned


def test_loss_that_is_not_finite_stops_that_job_only(tmp_path):
    sick = toy_config("sick", ADAPTERS["mixlora"], max_steps=6)
    configs = [sick, toy_config("well", max_steps=6)]
    expected = trained_weights(toy_engine(tmp_path / "healthy", configs))
    engine = toy_engine(tmp_path / "run", configs)
    sick, well, base = engine.jobs["sick"], engine.jobs["well"], engine.host.base
    poison(sick, step=4)
    results = engine.run()
    assert [result.status for result in results] == ["failed", "finished"]
    assert "job sick, step 4: loss must be finite, got nan" in results[0].error
    assert results[0].steps == 2  # the third one's weights gave the loss
    assert_same(weights_of(well), expected["well"], 1e-9)
    _, tensors = read_adapter(tmp_path / "run/sick", base)
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert read_result(tmp_path / "run/sick").error == results[0].error
    assert [line["step"] for line in read_metrics(tmp_path / "run/sick")] == [1, 2, 3]


def measured_matrix():
    """The matrix with evaluations, files amid it, a schedule and an optimizer with a state."""
    settings = {"lr_scheduler": "cosine", "eval_steps": 3, "save_steps": 2}
    data = {"task": "skills", "validation_fraction": 0.5}
    configs, sets = matrix(max_steps=8, data=data, **settings)
    for training_set in sets.values():
        training_set.validation.extend(toy_set(count=3, seed=len(sets)).examples)
    return configs, sets


@pytest.mark.parametrize(("stop", "options"), [(5, {}), (11, {"max_tokens_per_step": 80})])
def test_a_resumed_run_equals_an_unbroken_one_bit_by_bit(tmp_path, stop, options):
    configs, sets = measured_matrix()
    options = {"dtype": torch.float32, **options}
    toy_engine(tmp_path / "unbroken", configs, sets, **options).run()
    interrupted(toy_engine(tmp_path / "broken", configs, sets, **options), after_round=stop)
    assert any((tmp_path / "broken").glob("*/checkpoint-*/adapter_config.json"))
    (tmp_path / "broken/dora/checkpoint-99").mkdir()  # as of a run that was killed further on
    resumed(tmp_path / "broken", configs, sets, **options).run()
    for place in ("", "checkpoints/last"):
        names = [f"{name}/{place}" for name in sets]
        assert_same_files(tmp_path / "broken", tmp_path / "unbroken", names)
    assert_same_metrics(tmp_path / "broken", tmp_path / "unbroken", list(sets))
    files = intermediate_files(tmp_path / "broken")
    assert files == intermediate_files(tmp_path / "unbroken")
    assert {Path(name).parts[1] for name in files} == {
        f"checkpoint-{step}" for step in (2, 4, 6, 8)
    }


def test_a_job_that_joins_trains_as_it_does_from_the_start(tmp_path):
    configs, sets = matrix(max_steps=8)
    together = trained_weights(toy_engine(tmp_path / "together", configs, sets))
    engine = toy_engine(tmp_path / "joined", configs[:2], sets)
    jobs = dict(engine.jobs)

    def join(engine):
        if engine.round == 3:
            for config in configs[2:]:
                jobs[config.name] = add_job(engine.host, config, sets[config.name])
                engine.add(jobs[config.name])

    assert [result.job for result in engine.run(join)] == [config.name for config in configs]
    for name, job in jobs.items():
        assert_same(weights_of(job), together[name], 1e-9)
    assert [line["step"] for line in read_metrics(tmp_path / "joined/mixdora")] == [1]


@pytest.mark.parametrize("name", ["A", "done", "earlier"])
def test_a_job_that_can_not_join_leaves_nothing_on_the_host(tmp_path, name):
    toy_engine(tmp_path, [toy_config("earlier", max_steps=1)]).run()
    engine = toy_engine(tmp_path, [toy_config("a"), toy_config("done")])
    assert engine.stop("done", "no longer wanted") is engine.stop("done", "again")
    before = dict(engine.host.adapters)
    with pytest.raises(ConfigError, match="'gone' must be the name of a job"):
        engine.stop("gone", "by mistake")
    with pytest.raises(ConfigError, match="must be new in"):
        engine.add(add_job(engine.host, toy_config(name)))
    assert engine.host.adapters == before


def test_a_job_that_joins_is_not_made_of_one_that_trains(tmp_path):
    engine = toy_engine(tmp_path, [toy_config("law")])
    routed = toy_config("auto", RoutedConfig(experts={"law": "law"}, router="token"))
    job = add_job(engine.host, routed)
    assert all(name.endswith("router") for name in job.learner.parameters)
    engine.discard(job)
    with pytest.raises(ConfigError, match=r"adapter.experts must not be in .* where job law goes"):
        engine.add(add_job(engine.host, routed))


def test_a_stopped_job_keeps_its_weights_and_says_why(tmp_path):
    configs = [toy_config("a", max_steps=6), toy_config("b", max_steps=6)]
    expected = trained_weights(toy_engine(tmp_path / "whole", configs))
    engine = toy_engine(tmp_path / "run", configs)
    stopped, going, base = engine.jobs["a"], engine.jobs["b"], engine.host.base

    def stop(engine):
        if engine.round == 3:
            assert engine.stop("a", "the other one is better") == engine.results["a"]

    results = engine.run(stop)
    assert [(result.status, result.steps) for result in results] == [
        ("stopped", 3),
        ("finished", 6),
    ]
    assert results[0].error is None
    assert read_result(tmp_path / "run/a").stop_reason == "the other one is better"
    _, tensors = read_adapter(tmp_path / "run/a", base)
    for name, own in stopped.adapter.tensors().items():
        assert torch.equal(tensors[name], own)
    assert_same(weights_of(going), expected["b"], 1e-9)
    snapshot, _ = CheckpointStore(tmp_path / "run/.checkpoints").newest()
    assert {name: record.result.status for name, record in snapshot.jobs.items()} == {
        "a": "stopped",
        "b": "finished",
    }


def test_metrics_have_their_names(tmp_path):
    configs = [toy_config("mixture", ADAPTERS["mixlora"], max_steps=1), toy_config("plain")]
    toy_engine(tmp_path, configs).run()
    plain = {"step", "epoch", "loss", "aux_loss", "learning_rate", "grad_norm", "seconds"}
    plain |= {"tokens", "computed_tokens"}
    assert set(read_metrics(tmp_path / "plain")[0]) == plain
    (line,) = read_metrics(tmp_path / "mixture")
    assert set(line) == plain | {"router/entropy", "router/load_cv"}
    assert (line["step"], line["epoch"], line["learning_rate"]) == (1, 0.25, 1e-2)
    assert line["aux_loss"] > 0


def test_a_collapsed_router_is_told_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "WINDOW_STEPS", 2)
    monkeypatch.setattr(tally, "MIN_CHOICES_PER_EXPERT", 1)
    adapter = ADAPTERS["mixlora"].model_copy(update={"num_experts": 8, "router_jitter": 0.0})
    engine = toy_engine(tmp_path / "run", [toy_config("a", adapter, max_steps=8)])
    with torch.no_grad():  # all tokens to two experts
        for name, parameter in engine.jobs["a"].learner.parameters.items():
            if "router" in name:
                parameter.mul_(0).requires_grad_(False)
    result = engine.run()[0]
    (warning,) = result.warnings
    assert warning.startswith("steps 1 to 2: 12 of 16 experts are almost unused (")
    lines = [json.loads(x) for x in (tmp_path / "run/a/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "warnings" in line] == [2]
    assert read_result(tmp_path / "run/a").warnings == result.warnings
