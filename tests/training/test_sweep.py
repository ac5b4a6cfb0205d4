from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from rich.console import Console
from safetensors.torch import load_file

from loraloom.errors import ConfigError
from loraloom.training.engine import Engine
from loraloom.training.progress import Progress
from loraloom.training.run import train
from loraloom.training.settings import RunConfig
from loraloom.training.store import RunDirectory
from loraloom.training.sweep import AshaPruner, Sweep, plot_sweep
from loraloom.training.sweep_settings import SweepStoppingConfig
from tests.training.running import Spoken
from tests.training.saved import run_settings, save_inputs
from tests.training.toy import read_result

RATES = [1e-5, 3e-2, 1e-3, 1e-2, 1e-4, 3e-3]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def sweep_run(inputs, output_dir, jobs=(), eval_steps=None, **settings) -> RunConfig:
    """A sweep over the learning rate of the `plain` job, in batches that are cut in two."""
    run = run_settings(inputs, output_dir)
    plain = run["jobs"][0]
    plain["train"] |= {"max_steps": 9, "micro_batch_size": 2, "eval_steps": eval_steps}
    sweep = {
        "job": plain,
        "parameters": {"train.learning_rate": RATES},
        "early_stopping": {"asha": {"min_steps": 2, "reduction_factor": 2}},
    }
    return RunConfig.model_validate({**run, "jobs": list(jobs), "sweep": sweep | settings})


def read_csv(directory):
    with (directory / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def halved(inputs, tmp_path_factory):
    """Directory of a sweep that nothing interrupted."""
    directory = tmp_path_factory.mktemp("halved")
    train(sweep_run(inputs, directory))
    return directory


def test_after_each_rung_the_best_half_goes_on(inputs, halved):
    """Rungs 2, 4 and 8 of 9 steps; 6 jobs, then 3, then 1."""
    rows = read_csv(halved)
    steps = {row["name"]: int(row["steps"]) for row in rows}
    assert sorted(steps.values()) == [2, 2, 2, 4, 4, 9]
    for rung, num_kept in ((2, 3), (4, 1), (8, 1)):
        values = {row["name"]: row[f"eval/loss@{rung}"] for row in rows}
        reached = {name: float(value) for name, value in values.items() if value}
        best = sorted(reached, key=reached.__getitem__)[:num_kept]
        assert {name for name in reached if steps[name] > rung} == set(best)


def test_the_table_has_the_parameters_and_the_metric_of_the_weights(halved):
    rows = read_csv(halved)
    names = [f"plain-00{number}-{rate:g}" for number, rate in enumerate(RATES)]
    assert [row["name"] for row in rows] == names
    assert [float(row["train.learning_rate"]) for row in rows] == RATES
    (winner,) = [row for row in rows if row["status"] == "finished"]
    assert winner["rank"] == "1"
    assert float(winner["eval/loss"]) == read_result(halved / winner["name"]).metrics["eval/loss"]
    (lost, *_) = [row["name"] for row in rows if row["steps"] == "4"]
    result = read_result(halved / lost)
    assert (result.status, result.steps) == ("stopped", 4)
    assert "is not among the best after step 4" in result.stop_reason
    assert (halved / lost / "adapter_model.safetensors").exists()
    assert (halved / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_jobs_beside_a_sweep_train_to_their_end(inputs, tmp_path):
    jobs = run_settings(inputs, tmp_path)["jobs"]
    run = sweep_run(inputs, tmp_path, jobs, job="plain", early_stopping=None)
    results = train(run)
    assert [result.job for result in results] == ["mixture", *(t.name for t in run.trials)]
    assert {result.status for result in results} == {"finished"}
    assert "eval/loss@2" not in read_csv(tmp_path)[0]


def test_those_that_come_later_to_a_rung_are_judged_against_all_before(inputs, tmp_path):
    """Jobs of one micro-batch a step come first: each is judged when it is there."""
    sizes = [4, 2, 1]
    run = sweep_run(
        inputs,
        tmp_path,
        parameters={"train.micro_batch_size": sizes},
        early_stopping={"asha": {"rungs": [2], "reduction_factor": 2}},
    )
    train(run)
    rows = read_csv(tmp_path)
    values = [float(row["eval/loss@2"]) for row in rows]
    expected = ["finished"]  # the first is alone
    for place in (1, 2):
        is_best = values[place] < min(values[:place])  # of equal ones the first goes on
        expected.append("finished" if is_best else "stopped")
    assert [row["status"] for row in rows] == expected


def without_seconds(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def metrics_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_resumed_sweep_equals_an_unbroken_one(inputs, halved, tmp_path):
    """Interrupted after the fused step in which jobs come to a rung."""

    def interrupt(engine, _):
        if engine.round == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(sweep_run(inputs, tmp_path), between_steps=interrupt)
    train(sweep_run(inputs, tmp_path), resume=True)
    assert without_seconds(read_csv(tmp_path)) == without_seconds(read_csv(halved))
    for trial in sweep_run(inputs, tmp_path).trials:
        directory, unbroken = tmp_path / trial.name, halved / trial.name
        assert without_seconds(metrics_of(directory)) == without_seconds(metrics_of(unbroken))
        tensors = load_file(directory / "adapter_model.safetensors")
        expected = load_file(unbroken / "adapter_model.safetensors")
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_a_sweep_goes_on_without_its_journal(inputs, halved, tmp_path):
    directory = shutil.copytree(halved, tmp_path / "copy")
    (directory / "sweep.journal").unlink()
    shown = Spoken()
    train(sweep_run(inputs, directory), resume=True, progress=shown)
    assert not [text for text in shown.messages if text.startswith(("error", "warning"))]
    assert sorted(int(row["steps"]) for row in read_csv(directory)) == [2, 2, 2, 4, 4, 9]


def test_another_sweep_is_not_gone_on_with(inputs, halved, tmp_path):
    directory = shutil.copytree(halved, tmp_path / "copy")
    changed = sweep_run(inputs, directory, parameters={"train.learning_rate": RATES[:-1]})
    with pytest.raises(ConfigError, match=r"these differ: .*sweep\.parameters"):
        train(changed, resume=True)


def test_of_equal_jobs_the_first_goes_on_and_an_accuracy_is_better_when_higher():
    stopping = SweepStoppingConfig.model_validate({"asha": {"reduction_factor": 3, "rungs": [4]}})

    def kept(direction, values):
        study = optuna.create_study(direction=direction)
        study.add_trials(
            create_trial(value=0.0, intermediate_values={4: value}) for value in values
        )
        pruner = AshaPruner(stopping)
        return [trial.number for trial in study.trials if not pruner.prune(study, trial)]

    assert kept("minimize", [3.0, 1.0, 2.0, 1.0, 5.0, 4.0, 0.5]) == [1, 6]
    assert kept("maximize", [3.0, 1.0, 2.0, 1.0, 5.0, 4.0, 0.5]) == [4, 5]
    assert kept("minimize", [1.0, 1.0, 1.0]) == [0]
    assert kept("minimize", [3.0]) == [0]


TPE = {
    "parameters": {
        "train.learning_rate": {"log_uniform": [1e-5, 1e-1]},
        "adapter.method": ["lora", "mixlora"],
    },
    "search": {"tpe": 13, "seed": 1},
    "max_concurrent": 3,
    "early_stopping": {"asha": {"min_steps": 2}},
}


@pytest.fixture(scope="module")
def learned(inputs, tmp_path_factory):
    """Directory of a TPE sweep that nothing interrupted."""
    directory = tmp_path_factory.mktemp("learned")
    train(sweep_run(inputs, directory, **TPE))
    return directory


def test_tpe_trains_so_many_jobs_and_leaves_a_study_to_optuna(inputs, learned):
    rows = read_csv(learned)
    assert [row["name"][:9] for row in rows] == [f"plain-{number:03}" for number in range(13)]
    for row in rows:
        rate, method = row["train.learning_rate"], row["adapter.method"]
        assert sorted(row["name"][10:].rsplit("-", 1)) == sorted([rate, method])
    storage = JournalStorage(JournalFileBackend(str(learned / "sweep.journal")))
    study = optuna.load_study(study_name="sweep", storage=storage)
    states = {"finished": "COMPLETE", "stopped": "PRUNED"}
    for trial, row in zip(study.trials, rows, strict=True):
        assert trial.state.name == states[row["status"]]
        assert trial.value == float(row["eval/loss"])
        rate = trial.params["train.learning_rate"]
        assert float(row["train.learning_rate"]) == pytest.approx(rate, rel=1e-3)
        settings = json.loads((learned / row["name"] / "adapter_config.json").read_text())
        assert ("num_experts" in settings) == (row["adapter.method"] == "mixlora")


def test_a_killed_tpe_sweep_goes_on_to_the_jobs_of_an_unbroken_one(
    inputs, learned, tmp_path, monkeypatch
):
    """It dies where jobs have joined since the last snapshot, in a line of the journal."""
    save = Engine.save_state

    def dying(engine):
        if engine.round >= 17:
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
    assert without_seconds(read_csv(tmp_path)) == without_seconds(read_csv(learned))
    for row in read_csv(learned):
        directory, unbroken = tmp_path / row["name"], learned / row["name"]
        assert without_seconds(metrics_of(directory)) == without_seconds(metrics_of(unbroken))


def test_a_job_that_can_not_join_fails_alone(inputs, tmp_path):
    files = [str(inputs / "rows.jsonl"), str(tmp_path / "nowhere.jsonl")]
    shown = Spoken()
    run = sweep_run(
        inputs,
        tmp_path,
        parameters={"train.learning_rate": RATES[:2], "data.dataset": files},
        max_concurrent=1,
    )
    results = train(run, progress=shown)
    assert [result.job[:9] for result in results] == ["plain-000", "plain-002"]
    told = [text for text in shown.messages if text.startswith("error: sweep: plain-00")]
    assert len(told) == 2
    assert all("nowhere.jsonl" in text for text in told)


@pytest.mark.parametrize(
    "stopping",
    [{"hyperband": {"min_steps": 2, "reduction_factor": 2}}, {"median": {"min_jobs": 1}}],
    ids=["hyperband", "median"],
)
def test_other_pruners_stop_jobs_and_the_best_is_trained_to_its_end(inputs, tmp_path, stopping):
    run = sweep_run(inputs, tmp_path, eval_steps=2, early_stopping=stopping, max_concurrent=2)
    results = {result.job: result for result in train(run)}
    assert {result.status for result in results.values()} == {"finished", "stopped"}
    (best,) = [row for row in read_csv(tmp_path) if row["rank"] == "1"]
    assert best["status"] == "finished"
    stopped = [one for one in results.values() if one.status == "stopped"]
    assert all("is not among the best after step" in one.stop_reason for one in stopped)
    assert all(one.steps < 9 for one in stopped)


def test_a_rung_that_no_job_reaches_is_an_error_before_anything_is_written(inputs, tmp_path):
    run = sweep_run(inputs, tmp_path / "out", early_stopping={"asha": {"rungs": [2, 8]}})
    jobs = run.sweep.model_dump()
    jobs["job"]["train"] |= {"max_steps": None, "num_epochs": 2}
    with pytest.raises(ConfigError, match=r"^sweep.early_stopping .* 6 steps, got .*\(2, 8\)"):
        train(RunConfig.model_validate({**run.model_dump(), "sweep": jobs}))
    assert not (tmp_path / "out").exists()


def test_a_table_that_can_not_be_written_stops_nothing(inputs, tmp_path, monkeypatch):
    def full(*_):
        raise ConfigError("sweep.csv can't be written: No space left on device")

    monkeypatch.setattr("loraloom.training.sweep.write_output", full)
    results = train(sweep_run(inputs, tmp_path, search={"random": 1}))
    assert [result.error for result in results] == [None]


def test_a_run_warns_of_jobs_that_are_not_measured_alike(inputs, tmp_path):
    run = sweep_run(inputs, tmp_path).model_dump(mode="json")
    job = run["sweep"]["job"]
    job["data"] |= {"dataset": str(inputs / "pairs.jsonl"), "format": "preference"}
    job["train"] |= {"objective": {"name": "dpo"}, "max_steps": 1}
    parameters = {"seed": [0, 1], "train.objective.beta": [0.1, 0.5]}
    run["sweep"] |= {"parameters": parameters, "early_stopping": None}
    shown = Spoken()
    train(RunConfig.model_validate(run), progress=shown)
    rows, objectives = [text for text in shown.messages if text.startswith("warning")]
    assert "they hold out other rows" in rows
    assert "their objectives differ" in objectives


PARAMETERS = {
    "train.learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "data.template": CategoricalDistribution(['"[INST] {{ a }} [/INST]"']),
}


def trial_of(curve: dict[int, float], rate: float, state: str = "PRUNED", **ended) -> FrozenTrial:
    parameters = dict(zip(PARAMETERS, (rate, '"[INST] {{ a }} [/INST]"'), strict=True))
    return create_trial(
        state=TrialState[state],
        value=curve[max(curve)] if curve and state != "RUNNING" else None,
        params=parameters,
        distributions=PARAMETERS,
        intermediate_values=curve,
        user_attrs={"ended": ended} if ended else {},
    )


def test_those_that_passed_most_rungs_are_ahead_and_at_their_own_end_all_of_them(inputs, tmp_path):
    run = sweep_run(inputs, tmp_path, early_stopping={"asha": {"rungs": [3, 6]}})
    screen = io.StringIO()
    progress = Progress(Console(file=screen, width=200), interval_s=0.0)
    sweep = Sweep(run, RunDirectory(tmp_path), progress)
    sweep.study = optuna.create_study()
    end = {"steps": 3, "seconds": 1.25}
    sweep.study.add_trials(
        [
            trial_of({}, 1e-4, "FAIL", status="failed", value=0.1, **end),
            trial_of({3: 2.5}, 1e-4, status="stopped", value=2.5, **end),
            trial_of({}, 1e-4, "RUNNING"),
            trial_of({3: 2.0, 6: 1.5}, 1e-4, "RUNNING"),
            trial_of({3: 1.0, 6: 1.75}, 1e-4, status="stopped", value=1.0, **end),
            trial_of({2: 9.0}, 1e-4, "COMPLETE", status="stopped early", value=9.0, **end),
        ]
    )
    rows = sweep.rows()
    assert [row["rank"] for row in rows] == [6, 4, 5, 2, 3, 1]
    assert list(rows[1].values())[1:] == [
        *(4, "stopped", 3, "0.0001", "[INST] {{ a }} [/INST]", 2.5, None, 2.5, "1.2")
    ]
    sweep.show(is_over=True)
    line, header, first, *_ = screen.getvalue().splitlines()
    assert line.startswith("sweep: 2 of 6 jobs train, at step 6/9; best plain-005-0.0001-INST")
    assert header.split()[-4:] == ["eval/loss@3", "eval/loss@6", "eval/loss", "status"]
    assert "[INST] {{ a }} [/INST]" in first


def test_the_picture_has_a_curve_for_each_job_and_the_parameter_that_matters(tmp_path):
    """Jobs that depend on the rate alone; every second one was stopped."""
    study, states = optuna.create_study(), ["COMPLETE", "PRUNED"]
    curves = [{4: 5.0 - number} | ({8: 0.5} if number else {}) for number in range(6)]
    for number, curve in enumerate(curves):
        study.add_trial(trial_of(curve, 10.0 ** -(5 - number / 2), states[number % 2]))
    names = [f"lr-00{number}" for number in range(6)]
    left, right = plot_sweep(study, names, "eval/loss", tmp_path / "sweep.png").axes
    drawn = left.get_lines()
    assert [list(line.get_ydata()) for line in drawn] == [[*curve.values()] for curve in curves]
    assert [line.get_marker() for line in drawn] == ["o", "x"] * 3
    assert [text.get_text() for text in left.get_legend().get_texts()][-1] == "lr-000"
    assert right.get_xlabel() == "importance for eval/loss after step 4"
    assert right.patches[0].get_width() > 0.8
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
