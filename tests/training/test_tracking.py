import contextvars
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest.mock import Mock

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from loraloom.errors import ConfigError
from loraloom.training import reporting
from loraloom.training.engine import Engine
from loraloom.training.reporting import open_tracker
from loraloom.training.settings import TrackerName
from tests.training.running import Spoken, read_metrics
from tests.training.toy import toy_config, toy_engine, toy_set


def test_tensorboard_drops_what_a_resumed_job_logs_again(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError
    )
    for first_step, value in ((1, 1.0), (2, 5.0)):
        tracker = open_tracker("tensorboard", tmp_path, first_step, config={})
        for step in range(first_step, 4):
            tracker.log({"step": step, "loss": value, "warnings": ["collapsed"]})
        tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    losses = [(event.step, event.value) for event in events.Scalars("loss")]
    assert losses == [(1, 1.0), (2, 5.0), (3, 5.0)]


class FakeRun:
    """What trackio and wandb return from init."""

    def __init__(self, settings):
        self.settings = settings
        self.logged = []
        self.finished = False

    def log(self, metrics, step):
        assert not self.finished
        self.logged.append((step, metrics))

    def finish(self):
        self.finished = True


@pytest.fixture
def fakes(monkeypatch):
    """Stand-ins of trackio and wandb; the list is of the runs that were begun."""
    runs = []
    current = contextvars.ContextVar("current", default=None)

    def init(**settings):
        if current.get() is not None:
            current.get().finish()  # as trackio does
        runs.append(FakeRun(settings))
        current.set(runs[-1])
        return runs[-1]

    wandb = SimpleNamespace(init=lambda **more: runs.append(FakeRun(more)) or runs[-1])
    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for variable in ("WANDB_MODE", "WANDB_PROJECT", "TRACKIO_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    return runs


def open_hosted(name, directory, job):
    (directory / job).mkdir(exist_ok=True)
    return open_tracker(name, directory / job, 1, {"seed": 7})


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_each_job_has_a_run_of_its_own_with_its_config(fakes, tmp_path, monkeypatch, name):
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    directory = tmp_path / "arc"
    directory.mkdir()
    trackers = [open_hosted(name, directory, job) for job in ("a", "b")]
    for step, tracker in enumerate([*trackers, trackers[0]]):
        tracker.log({"step": step, "loss": 0.5 * step})
    assert [run.logged for run in fakes] == [
        [(0, {"loss": 0.0}), (2, {"loss": 1.0})],
        [(1, {"loss": 0.5})],
    ]
    for run, job in zip(fakes, "ab", strict=True):
        assert run.settings["config"] == {"seed": 7}
        assert (run.settings["project"], run.settings["group"]) == ("mine", "arc")
        assert run.settings["name"] == job
    trackers[0].close()
    assert [run.finished for run in fakes] == [True, False]


def test_wandb_is_offline_unless_the_user_has_told_it_otherwise(fakes, tmp_path, monkeypatch):
    open_hosted("wandb", tmp_path, "a")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    open_hosted("wandb", tmp_path, "b")
    assert [run.settings["mode"] for run in fakes] == ["offline", "disabled"]


def tracked_engine(directory, tracker, progress=None, **train) -> Engine:
    config = toy_config("a", data={"task": "skills", "validation_fraction": 0.5}, **train)
    sets = {"a": toy_set(num_validation=2)}
    return toy_engine(directory, [config], sets, progress=progress, trackers=(tracker,))


def test_a_tracker_that_fails_is_told_of_once_and_ends_nothing(fakes, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("no route to the host")

    monkeypatch.setattr(FakeRun, "log", fail)
    spoken = Spoken()
    (result,) = tracked_engine(tmp_path, "trackio", spoken).run()
    assert (result.status, result.steps) == ("finished", 4)
    (warning,) = [text for text in spoken.messages if text.startswith("warning")]
    assert warning.startswith("warning: job a: trackio cannot log metrics: no route to the host")


def test_metrics_are_on_the_disk_before_a_snapshot_counts_them(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    tracked_engine(tmp_path, "jsonl", max_steps=3, save_steps=1).run()
    names = [Path(file).name for file in synced]
    snapshots = [place for place, name in enumerate(names) if name == "manifest.json"]
    assert len(snapshots) >= 3
    for place, before in zip(snapshots, [0, *snapshots], strict=False):
        assert "metrics.jsonl" in names[before:place]
    monkeypatch.setattr(reporting, "sync", Mock(side_effect=OSError("quota")))
    (result,) = tracked_engine(tmp_path / "full", "jsonl", max_steps=3, save_steps=1).run()
    assert result.status == "finished"


def test_the_names_are_those_of_accelerate():
    assert {"jsonl", *LOGGER_TYPE_TO_CLASS} == set(get_args(TrackerName))


def test_a_missing_package_is_an_error_before_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "comet_ml", None)
    with pytest.raises(ConfigError, match=r"comet_ml requires .*Run `pip install comet-ml`"):
        tracked_engine(tmp_path, "comet_ml")
    assert not any(tmp_path.iterdir())


def test_a_tracker_of_a_single_run_refuses_jobs_that_train_together(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "clearml", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace())
    monkeypatch.setenv("MLFLOW_RUN_ID", "7f")
    for name in ("clearml", "mlflow"):
        with pytest.raises(ConfigError, match=f"{name} holds a single run in a process, got 2"):
            toy_engine(tmp_path, [toy_config("a"), toy_config("b")], trackers=(name,))


def test_jobs_that_train_together_have_their_configuration_and_metrics_apart(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path / 'mlruns'}")
    configs = [toy_config("a", seed=1), toy_config("b", seed=2, max_steps=3)]
    toy_engine(tmp_path / "run", configs, trackers=("mlflow", "tensorboard")).run()
    runs = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert {run.info.run_name for run in runs} == {"a", "b"}
    for run in runs:
        name = run.info.run_name
        assert run.info.status == "FINISHED"
        assert run.data.params["seed"] == {"a": "1", "b": "2"}[name]
        assert run.data.params["train.batch_size"] == "4"
        history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
        expected = [(line["step"], line["loss"]) for line in read_metrics(tmp_path / "run" / name)]
        assert [(metric.step, metric.value) for metric in history] == expected
        logged = tmp_path / "run" / name / "tensorboard"
        losses = reader.EventAccumulator(str(logged)).Reload().Scalars("loss")
        assert [event.step for event in losses] == [step for step, _ in expected]
        (hparams,) = logged.glob("*/hparams.yml")
        assert f"seed: {run.data.params['seed']}" in hparams.read_text()
