import csv
import json
import shutil

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial

from loraloom.errors import ConfigError
from loraloom.training.engine import Engine
from loraloom.training.run import train
from loraloom.training.run_directory import RunDirectory
from loraloom.training.settings import RunConfig
from loraloom.training.sweep import rank_jobs, show_ranking
from tests.training.running import Spoken, assert_same_files, assert_same_metrics, pressing
from tests.training.saved import run_settings
from tests.training.toy import read_result

RATES = [1e-5, 3e-2, 1e-3, 1e-2, 1e-4, 3e-3]


def sweep_run(inputs, output_dir, eval_steps=None, max_steps=9, **settings) -> RunConfig:
    """A sweep over the learning rate of the `plain` job, in batches that are cut in two."""
    run = run_settings(inputs, output_dir)
    plain = run["jobs"][0]
    plain["train"] |= {"max_steps": max_steps, "micro_batch_size": 2, "eval_steps": eval_steps}
    sweep = {
        "job": plain,
        "parameters": {"train.learning_rate": RATES},
        "early_stopping": {"asha": {"min_steps": 2, "reduction_factor": 2}},
    }
    return RunConfig.model_validate({**run, "jobs": [], "sweep": sweep | settings})


def read_csv(directory):
    with (directory / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def load_study(directory) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(directory / "sweep.journal")))
    return optuna.load_study(study_name="sweep", storage=storage)


@pytest.fixture(scope="module")
def halved(inputs, tmp_path_factory):
    """Directory of a sweep that nothing interrupted."""
    directory = tmp_path_factory.mktemp("halved")
    train(sweep_run(inputs, directory))
    return directory


def test_after_each_rung_the_best_goes_on_and_others_are_stopped(halved):
    """Rungs 2, 4 and 8 of 9 steps."""
    curves = [trial.intermediate_values for trial in load_study(halved).trials]
    steps = [max(curve) for curve in curves]
    assert 9 in steps
    assert steps.count(2) >= 2
    for rung in (2, 4, 8):
        reached = [curve for curve in curves if rung in curve]
        assert max(min(reached, key=lambda curve: curve[rung])) > rung


def test_the_table_has_the_parameters_and_the_metric_of_the_weights(halved):
    rows = read_csv(halved)
    names = {f"plain-00{number}-{rate:g}": rate for number, rate in enumerate(RATES)}
    assert {row["name"]: float(row["train.learning_rate"]) for row in rows} == names
    assert [row["rank"] for row in rows] == list("123456")
    steps = [int(row["steps"]) for row in rows]
    assert steps == sorted(steps, reverse=True)
    winner, lost = rows[0], rows[-1]
    assert (winner["status"], lost["status"]) == ("finished", "stopped")
    assert float(winner["eval/loss"]) == read_result(halved / winner["name"]).metrics["eval/loss"]
    result = read_result(halved / lost["name"])
    assert (result.status, result.steps) == ("stopped", 2)
    assert "is not among the best after step 2" in result.stop_reason
    assert (halved / lost["name"] / "adapter_model.safetensors").exists()


def test_a_resumed_sweep_equals_an_unbroken_one(inputs, halved, tmp_path):
    """Interrupted after the fused step in which jobs come to a rung."""
    with pytest.raises(KeyboardInterrupt):
        train(sweep_run(inputs, tmp_path), between_steps=pressing(4))
    train(sweep_run(inputs, tmp_path), resume=True)
    assert read_csv(tmp_path) == read_csv(halved)
    names = [trial.name for trial in sweep_run(inputs, tmp_path).trials]
    assert_same_files(tmp_path, halved, names)
    assert_same_metrics(tmp_path, halved, names)


def test_another_sweep_is_not_gone_on_with(inputs, halved, tmp_path):
    directory = shutil.copytree(halved, tmp_path / "copy")
    changes = {"parameters": {"train.learning_rate": RATES[:-1]}, "search": {"random": 6}}
    for name, value in changes.items():
        with pytest.raises(ConfigError, match=rf"the interrupted run: sweep\.{name}"):
            train(sweep_run(inputs, directory, **{name: value}), resume=True)


TPE = {
    "max_steps": 4,
    "parameters": {"train.learning_rate": {"log_uniform": [1e-5, 1e-1]}, "adapter.rank": [2, 4]},
    "search": {"tpe": 12, "seed": 1},
    "max_concurrent": 3,
    "early_stopping": {"asha": {"min_steps": 2}},
}


@pytest.fixture(scope="module")
def learned(inputs, tmp_path_factory):
    """Directory of a TPE sweep that nothing interrupted."""
    directory = tmp_path_factory.mktemp("learned")
    train(sweep_run(inputs, directory, **TPE))
    return directory


def test_tpe_trains_so_many_jobs_and_leaves_a_study_to_optuna(learned):
    rows = sorted(read_csv(learned), key=lambda row: row["name"])
    assert [row["name"][:9] for row in rows] == [f"plain-{number:03}" for number in range(12)]
    states = {"finished": "COMPLETE", "stopped": "PRUNED"}
    for trial, row in zip(load_study(learned).trials, rows, strict=True):
        assert trial.state.name == states[row["status"]]
        assert trial.value == float(row["eval/loss"])
        rate, rank = row["train.learning_rate"], row["adapter.rank"]
        assert sorted(row["name"][10:].rsplit("-", 1)) == sorted([rate, rank])
        assert float(rate) == pytest.approx(trial.params["train.learning_rate"], rel=1e-3)
        settings = json.loads((learned / row["name"] / "adapter_config.json").read_text())
        assert settings["r"] == int(rank)


def test_a_killed_tpe_sweep_goes_on_to_the_jobs_of_an_unbroken_one(
    inputs, learned, tmp_path, monkeypatch
):
    """It dies where jobs have joined since the last snapshot, in a line of the journal."""
    save = Engine.save_state

    def dying(engine):
        if engine.round >= 11:
            raise RuntimeError("killed")
        save(engine)

    run = sweep_run(inputs, tmp_path, **TPE)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "save_state", dying)
        with pytest.raises(RuntimeError, match="killed"):
            train(run)
    with (tmp_path / "sweep.journal").open("a") as journal:
        journal.write('{"op_code": 5, "torn')
    train(run, resume=True)
    assert read_csv(tmp_path) == read_csv(learned)
    assert_same_metrics(tmp_path, learned, [row["name"] for row in read_csv(learned)])


def test_a_job_that_can_not_join_fails_alone(inputs, tmp_path):
    starts = [None, str(tmp_path / "nowhere")]
    shown = Spoken()
    run = sweep_run(
        inputs,
        tmp_path,
        max_steps=2,
        parameters={"train.learning_rate": RATES[:2], "start_from": starts},
        early_stopping=None,
        max_concurrent=1,
    )
    assert [result.job[:9] for result in train(run, progress=shown)] == ["plain-000", "plain-002"]
    told = [text for text in shown.messages if text.startswith("error: sweep: plain-00")]
    assert len(told) == 2
    assert all("nowhere" in text for text in told)


PARAMETERS = {
    "train.learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "data.template": CategoricalDistribution(['"[INST] {{ a }} [/INST]"']),
}


def trial_of(curve: dict[int, float], state: str = "PRUNED") -> FrozenTrial:
    return create_trial(
        state=TrialState[state],
        value=None if state in ("RUNNING", "FAIL") else curve[max(curve)],
        params=dict(zip(PARAMETERS, (1e-4, '"[INST] {{ a }} [/INST]"'), strict=True)),
        distributions=PARAMETERS,
        intermediate_values=curve,
    )


def test_those_at_their_end_are_ahead_then_those_that_got_further(inputs, tmp_path):
    run, study = sweep_run(inputs, tmp_path), optuna.create_study()
    study.add_trials(
        [
            trial_of({}, "FAIL"),
            trial_of({3: 2.5}),
            trial_of({}, "RUNNING"),
            trial_of({3: 2.0, 6: 1.5}, "RUNNING"),
            trial_of({3: 1.0, 6: 1.75}),
            trial_of({2: 9.0}, "COMPLETE"),
        ]
    )
    names = [row["name"][:9] for row in rank_jobs(run, study)]
    assert names == [f"plain-00{number}" for number in (5, 3, 4, 1, 2, 0)]
    spoken = Spoken()
    show_ranking(run, study, RunDirectory(tmp_path), spoken)
    assert [row["name"][:9] for row in read_csv(tmp_path)] == names
    header, first, *_ = spoken.messages[0].splitlines()
    assert header.split()[:4] == ["name", "rank", "status", "steps"]
    assert first.split()[1:4] == ["1", "finished", "2"]
    assert "9.0000" in first
