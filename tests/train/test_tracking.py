from __future__ import annotations

import builtins
import json
import sys

import pytest

from loraloom.errors import ConfigError
from loraloom.train.micro_batch import MicroBatchLoss, StepReport
from loraloom.train.tracking import MetricsFile, check_trackers, open_trackers, step_metrics


def test_a_step_of_a_plain_adapter_has_no_router_metrics():
    report = StepReport(3, 0.123456, MicroBatchLoss(1.5), 1e-3, 0.7, 420)
    assert step_metrics(report, 2.00049) == {
        "step": 3,
        "epoch": 0.1235,
        "loss": 1.5,
        "aux_loss": 0.0,
        "learning_rate": 1e-3,
        "grad_norm": 0.7,
        "tokens": 420,
        "seconds": 2.0,
    }


def test_a_step_of_a_mixture_has_router_metrics():
    report = StepReport(1, 1.0, MicroBatchLoss(1.5, 0.02, 0.9, 0.1), 1e-3, 0.7, 42)
    metrics = step_metrics(report, 1.0)
    assert (metrics["router/entropy"], metrics["router/load_cv"]) == (0.9, 0.1)
    assert metrics["aux_loss"] == 0.02


def test_metrics_file_appends_a_line_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        tracker = MetricsFile(path)
        tracker.log({"step": step, "loss": 0.5})
        assert len(path.read_text().splitlines()) == step
        tracker.close()
    assert json.loads(path.read_text().splitlines()[1]) == {"step": 2, "loss": 0.5}


def test_tensorboard_gets_every_scalar(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", exc_type=ImportError
    )
    trackers = open_trackers(("jsonl", "tensorboard"), tmp_path, first_step=1)
    for tracker in trackers:
        tracker.log({"step": 1, "loss": 2.0, "eval/loss": 3.0})
        tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/loss", "loss"]
    assert events.Scalars("loss")[0].value == 2.0


def test_a_tracker_that_is_not_installed_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without_tensorboard(name, *args, **kwargs):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_tensorboard)
    check_trackers(("jsonl",))
    with pytest.raises(ConfigError, match=r"pip install 'loraloom\[track\]'"):
        check_trackers(("jsonl", "tensorboard"))
