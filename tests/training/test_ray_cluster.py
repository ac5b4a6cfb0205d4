"""Evaluations on a cluster's workers give what one process gives; Ray itself is played here."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loraloom.cli import main as cli
from loraloom.errors import AdapterError, DataError
from loraloom.training import ray_cluster
from tests.generation.saved import save_tiny


class Call:
    """What a task of `PlayedRay` gave, or raised."""

    def __init__(self, value: Any):
        self.value = value


class PlayedRay:
    """Does tasks at once; or loses every worker."""

    class exceptions:  # noqa: N801
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

    def __init__(self, *, is_lossy: bool = False):
        self.is_lossy, self.shares, self.cancelled = is_lossy, [], []

    def put(self, value: Any) -> Any:
        return value

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": 2.0}}]

    def remote(self, function: Any) -> Any:
        def call(score, names, place):
            self.shares.append(names)
            try:
                return Call(function(score, names, place))
            except Exception as error:
                return Call(self.exceptions.RayTaskError(repr(error)))

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=call))

    def wait(self, calls: list[Any]) -> tuple[list[Any], list[Any]]:
        return calls[-1:], calls[:-1]

    def get(self, call: Call) -> Any:
        if self.is_lossy:
            raise self.exceptions.RayError("The worker died.\nMore of it.")
        if isinstance(call.value, self.exceptions.RayTaskError):
            raise call.value
        return call.value

    def cancel(self, call: Any, force: bool) -> None:
        assert force
        self.cancelled.append(call)


@pytest.fixture
def play(monkeypatch):
    def playing(ray: PlayedRay) -> PlayedRay:
        monkeypatch.setattr(ray_cluster, "connected", lambda address: nullcontext(ray))
        return ray

    return playing


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    directory = save_tiny(tmp_path_factory.mktemp("saved"))
    rows = [{"instruction": f"Say {n}", "output": f"{n}"} for n in range(5)]
    (directory / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return directory


def evaluated(saved: Path, output: Path, *words: str) -> dict[str, Any]:
    adapters = [f"--adapter={name}={saved / kind}" for name, kind in
                (("b", "mixlora"), ("a@0", "lora"), ("a@1", "mixlora"))]  # fmt: skip
    base = ["--base-model", str(saved / "base"), "--device", "cpu", "--dtype", "float32"]
    files = ["--output", str(output), "--no-cache"]
    assert cli.main(["eval", *base, *adapters, *words, *files]) == 0
    written = json.loads(output.read_text())
    return {name: value for name, value in written.items() if name not in ("command", "date")}


@pytest.mark.parametrize("kind", ["--task", "--dataset"])
def test_the_results_are_those_of_one_process(saved, tmp_path, capsys, play, kind):
    words = {
        "--task": ["--task", "skills", "--limit", "6", "--compare", "b:a"],
        "--dataset": ["--dataset", str(saved / "rows.jsonl"), "--format", "instruction"],
    }[kind]
    expected = evaluated(saved, tmp_path / "one.json", *words)
    tables = capsys.readouterr().out
    ray = play(PlayedRay())
    together = ["--ray", "auto", "--ray-workers", "2"]
    assert evaluated(saved, tmp_path / "many.json", *words, *together) == approximately(expected)
    assert ray.shares == [[None, "a@0"], ["b", "a@1"]]
    printed = capsys.readouterr()
    assert "2 of 2 workers have scored their adapters" in printed.err
    assert printed.out == tables


def approximately(value: Any) -> Any:
    """Numbers of batches of another shape differ by rounding."""
    if isinstance(value, dict):
        return {name: approximately(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [approximately(entry) for entry in value]
    return pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value


def test_an_error_in_a_worker_is_raised_and_the_others_end(play):
    ray = play(PlayedRay())

    def score(names):
        raise DataError(f"no data for {names}")

    with pytest.raises(DataError, match="no data for \\['b'\\]"):
        ray_cluster.score_on_workers(score, ["a", "b"], "auto", 2, "cpu", print)
    assert len(ray.cancelled) == 2


def test_workers_that_are_lost_are_an_error(play):
    play(PlayedRay(is_lossy=True))
    with pytest.raises(AdapterError, match=r"scored some adapters were lost: The worker died\.$"):
        ray_cluster.score_on_workers(len, ["a"], "auto", None, "cpu", print)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ray-workers", "2"], "--ray-workers has no effect without --ray"),
        (["--ray", "auto", "--device", "cuda:1"], "device must be one of auto, cpu, cuda, xpu"),
        (
            ["--ray", "auto", "--device", "cuda"],
            "needs a device of its own, got 1 workers and 0 acc",
        ),
        (["--ray", "auto", "--harness", "x"], "--ray has an effect with --task or --dataset only"),
    ],
)
def test_options_that_do_not_go_together_are_errors(saved, capsys, play, words, message):
    play(PlayedRay())
    asked = [] if "--harness" in words else ["--task", "skills"]
    assert cli.main(["eval", "--base-model", str(saved / "base"), *asked, *words]) == 2
    assert message in capsys.readouterr().err
