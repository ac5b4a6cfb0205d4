import contextvars
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from loraloom.training import reporting
from loraloom.training.engine import Engine
from loraloom.training.reporting import open_tracker
from tests.training.running import Spoken
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
