"""A cluster whose workers are in this process, against training without one."""

from __future__ import annotations

import csv
import json
import os
import signal

import pytest

import loraloom
from benchmarks.parallel import difference
from loraloom.config.run import RunConfig
from loraloom.errors import ConfigError, ModelError, TrainingError
from loraloom.training.cluster.board import MAX_LOSSES, Board
from loraloom.training.cluster.hiring import MAX_FAILED_STARTS
from loraloom.training.run import evaluation
from loraloom.training.run.builder import JobBuilder
from tests.training.cluster.crews import LocalCrew, train_locally
from tests.training.running import read_metrics
from tests.training.saved import run_settings, save_inputs

NAMES = ("plain", "mixture")
RATES = [1e-5, 3e-2, 1e-3, 1e-2]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module", autouse=True)
def accuracies():
    """Score no questions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            evaluation, "score_accuracy", lambda _, __, ___, names: dict.fromkeys(names, 0.5)
        )
        yield


def settings(inputs, output_dir, **changes) -> RunConfig:
    return RunConfig.model_validate(run_settings(inputs, output_dir) | changes)


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """The results of the run in one process."""
    directory = tmp_path_factory.mktemp("alone")
    loraloom.train(settings(inputs, directory))
    return directory


def assert_same_results(directory, expected, names=NAMES):
    for name in names:
        assert difference(directory / name, expected / name).whole < 1e-6
        ignored = {"seconds": 0, "computed_tokens": 0}
        pairs = zip(read_metrics(directory / name), read_metrics(expected / name), strict=True)
        for line, other in pairs:
            assert line | ignored == pytest.approx(other | ignored, rel=1e-4, abs=1e-6)


def test_workers_give_the_weights_metrics_and_files_of_one_process(inputs, alone, tmp_path):
    results, spoken = train_locally(settings(inputs, tmp_path))
    assert [(one.job, one.status, one.steps) for one in results] == [
        ("plain", "finished", 4),
        ("mixture", "finished", 4),
    ]
    assert_same_results(tmp_path, alone)
    for name in NAMES:
        files = [sorted(path.name for path in (one / name).iterdir()) for one in (tmp_path, alone)]
        assert files[0] == files[1]
    assert {
        "starting 2 workers",
        "all workers are there; they load the base model",
        "plain: on worker 0, after step 0",
        "mixture: on worker 1, after step 0",
    } <= set(spoken.messages)


def test_jobs_of_a_lost_worker_go_on_elsewhere_from_their_snapshots(
    inputs, alone, tmp_path, monkeypatch
):
    monkeypatch.setattr("loraloom.training.cluster.cluster.SLICE_S", 0.0)  # a step at a time
    calls = []

    def dies(worker, method, _):
        calls.append((worker, method))
        return worker == 1 and calls.count((1, "advance")) == 3

    _, spoken = train_locally(settings(inputs, tmp_path), dies=dies)
    assert (
        "warning: worker 1 was lost: killed; its jobs go on elsewhere: mixture" in spoken.messages
    )
    assert "mixture: on worker 0, after step 2" in spoken.messages
    assert_same_results(tmp_path, alone)


def test_a_job_that_kills_every_worker_fails_alone_and_says_why(inputs, alone, tmp_path):
    def dies(_, method, jobs):
        return method == "advance" and "mixture" in jobs

    results, _ = train_locally(settings(inputs, tmp_path), 1, dies)
    plain, mixture = results
    assert (plain.status, mixture.status) == ("finished", "failed")
    reason = f"job mixture: {MAX_LOSSES} workers were lost that trained it: killed"
    assert mixture.error == reason
    assert json.loads((tmp_path / "mixture/result.json").read_text())["error"] == reason
    assert_same_results(tmp_path, alone, ["plain"])


def test_a_cluster_whose_workers_never_get_ready_ends_the_run(inputs, tmp_path):
    hired = []

    def dies(worker, method, _):
        hired.append(worker)
        return method == "advance" or worker > 1

    with pytest.raises(TrainingError, match="no worker is left, the last one was lost: killed"):
        train_locally(settings(inputs, tmp_path), 2, dies)
    assert max(hired) == 2 + MAX_FAILED_STARTS


def test_ctrl_c_saves_and_resume_goes_on(inputs, alone, tmp_path, monkeypatch):
    monkeypatch.setattr("loraloom.training.cluster.cluster.SLICE_S", 0.0)
    calls = []

    def interrupts(worker, method, _):
        calls.append(method)
        if calls.count("advance") == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    run = settings(inputs, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train_locally(run, dies=interrupts)
    with pytest.raises(ConfigError, match=r"needs a run that was trained without --ray.*auto"):
        loraloom.train(run, resume=True)
    _, spoken = train_locally(run, 1, resume=True)
    assert any(text.startswith("going on with 0 of 2 jobs done") for text in spoken.messages)
    assert_same_results(tmp_path, alone)
    changed = run.model_dump(mode="json")
    changed["jobs"][1]["train"]["learning_rate"] = 1e-3
    with pytest.raises(ConfigError, match=r"train\.learning_rate was 0.005 and is 0.001"):
        train_locally(RunConfig.model_validate(changed), 1, resume=True)


def test_faults_end_the_run_before_anything_is_written(inputs, tmp_path):
    with pytest.raises(ModelError, match="gone"):
        train_locally(settings(inputs, tmp_path, base_model="gone/"))
    with pytest.raises(ConfigError, match="a step must fit into"):
        train_locally(settings(inputs, tmp_path, memory_limit=1_000_000))
    broken = run_settings(inputs, tmp_path)
    broken["jobs"][1]["data"]["path"] = "nowhere"
    with pytest.raises(loraloom.DataError, match="job mixture"):
        train_locally(RunConfig.model_validate(broken))
    assert list(tmp_path.iterdir()) == []


def test_jobs_wait_where_memory_has_no_room_for_all(inputs, alone, tmp_path):
    """Both fit alone, but not together."""
    limit = "4.7MB"
    _, spoken = train_locally(settings(inputs, tmp_path, memory_limit=limit), 1)
    begun = [text for text in spoken.messages if "on worker" in text or ": done" in text]
    assert [text.split(":")[0] for text in begun] == ["plain", "plain", "mixture", "mixture"], (
        spoken.messages
    )
    assert_same_results(tmp_path, alone)


def sweep_run(inputs, output_dir, **sweep) -> RunConfig:
    run = run_settings(inputs, output_dir)
    plain = run.pop("jobs")[0]
    plain["train"] |= {"max_steps": 5, "micro_batch_size": 2, "eval_steps": 2}
    sweep = {"job": plain, "parameters": {"train.learning_rate": RATES}} | sweep
    return RunConfig.model_validate({**run, "sweep": sweep})


SWEEPS = {
    "asha": {"early_stopping": {"asha": {"min_steps": 2, "reduction_factor": 2}}},
    "tpe": {
        "parameters": {"train.learning_rate": {"log_uniform": [1e-4, 1e-2]}},
        "search": {"tpe": 11},
        "max_concurrent": 3,
        "early_stopping": {"median": {"min_jobs": 2, "min_steps": 2}},
    },
}


def read_csv(directory):
    with (directory / "sweep.csv").open() as file:
        return [row | {"seconds": ""} for row in csv.DictReader(file)]


def assert_same_trials(directory, expected):
    rows, others = read_csv(directory), read_csv(expected)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            try:
                assert float(value) == pytest.approx(float(other[key]), rel=1e-4)
            except ValueError:
                assert value == other[key], key


@pytest.mark.parametrize("kind", SWEEPS)
def test_a_sweep_over_workers_of_other_speeds_decides_as_one_process(
    inputs, tmp_path, monkeypatch, kind
):
    """A worker is lost on the way, too."""
    monkeypatch.setattr("loraloom.training.cluster.cluster.SLICE_S", 0.02)
    loraloom.train(sweep_run(inputs, tmp_path / "one", **SWEEPS[kind]))
    calls = []

    def dies(worker, method, _):
        calls.append((worker, method))
        return worker == 1 and calls.count((1, "advance")) == 4

    train_locally(sweep_run(inputs, tmp_path / "many", **SWEEPS[kind]), dies=dies)
    assert_same_trials(tmp_path / "many", tmp_path / "one")


def test_a_sweep_goes_on_after_ctrl_c_to_the_same_trials(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("loraloom.training.cluster.cluster.SLICE_S", 0.0)
    loraloom.train(sweep_run(inputs, tmp_path / "one", **SWEEPS["asha"]))
    calls = []

    def interrupts(worker, method, _):
        calls.append(method)
        if calls.count("advance") == 9:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    run = sweep_run(inputs, tmp_path / "many", **SWEEPS["asha"])
    with pytest.raises(KeyboardInterrupt):
        train_locally(run, dies=interrupts)
    train_locally(run, resume=True)
    assert_same_trials(tmp_path / "many", tmp_path / "one")


def test_results_after_a_resume_are_in_the_order_of_the_run_file(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("loraloom.training.cluster.cluster.SLICE_S", 0.0)
    run = run_settings(inputs, tmp_path)
    run["jobs"][0]["train"]["max_steps"] = 8  # `mixture`, the second one, ends before it
    calls = []

    def interrupts(worker, method, _):
        calls.append((worker, method))
        if calls.count((0, "advance")) == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    with pytest.raises(KeyboardInterrupt):
        train_locally(RunConfig.model_validate(run), dies=interrupts)
    results, spoken = train_locally(RunConfig.model_validate(run), resume=True)
    assert any(text.startswith("going on with 1 of 2 jobs done") for text in spoken.messages)
    assert [one.job for one in results] == list(NAMES)
    seconds = [line["seconds"] for line in read_metrics(tmp_path / "plain")]
    assert seconds == sorted(seconds)


def test_workers_that_were_at_work_are_all_replaced(inputs, tmp_path):
    hired = []

    def dies(worker, method, _):
        hired.append(worker)
        return worker < 4 and method == "advance"

    run = sweep_run(inputs, tmp_path)
    results, spoken = train_locally(run, 4, dies)
    assert max(hired) == 7
    assert not any("none is replaced" in text for text in spoken.messages)
    assert {one.status for one in results} == {"finished"}


def test_a_sweep_that_loses_its_last_worker_goes_on_with_the_same_trials(inputs, tmp_path):
    calls = []

    def dies(worker, method, _):
        calls.append(method)
        return worker > 0 or calls.count("measure") == 2

    run = sweep_run(inputs, tmp_path, max_concurrent=1)
    with pytest.raises(TrainingError, match="no worker is left"):
        train_locally(run, 1, dies)
    results, _ = train_locally(run, 1, resume=True)
    assert [one.status for one in results] == ["finished"] * len(RATES)


class StuckCrew(LocalCrew):
    """Only its first two workers ever answer."""

    def ask(self, worker, method, *args):
        return ["never"] if worker > 1 else super().ask(worker, method, *args)

    def wait(self, calls, timeout_s):
        return [call for call in calls if call != ["never"]]


def test_a_sweep_does_not_wait_for_ever_for_a_worker_that_never_comes(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr("loraloom.training.cluster.cluster.SLICE_S", 0.0)
    monkeypatch.setattr(Board, "_fits", lambda board, _, worker: not board.jobs_on(worker))
    calls = []

    def dies(worker, method, _):
        calls.append((worker, method))
        if calls.count((1, "advance")) == 2:
            monkeypatch.setattr("loraloom.training.cluster.hiring.START_S", 0.0)
        return worker == 1 and calls.count((1, "advance")) == 2

    run = sweep_run(
        inputs, tmp_path, parameters={"train.learning_rate": RATES[:2]}, **SWEEPS["asha"]
    )
    monkeypatch.setattr("tests.training.cluster.crews.LocalCrew", StuckCrew)
    results, _ = train_locally(run, 2, dies)
    assert len(results) == 2


def test_a_job_that_can_not_be_built_costs_no_worker(inputs, tmp_path, monkeypatch):
    built = []
    build = JobBuilder.build

    def fails(builder, config):
        built.append(config.name)
        if len(built) == 3:
            raise ArithmeticError("did not converge")
        return build(builder, config)

    monkeypatch.setattr(JobBuilder, "build", fails)
    results, spoken = train_locally(sweep_run(inputs, tmp_path, max_concurrent=1), 1)
    assert not any("was lost" in text for text in spoken.messages)
    assert len(results) < len(RATES)
