"""Training on a Ray cluster that is played, and on one of this machine."""

import socket
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import loraloom
from loraloom.cli import main as cli
from loraloom.config.text import apply_override
from loraloom.errors import ConfigError, DataError, TrainingError
from loraloom.training import workers
from loraloom.training.engine import Engine
from tests.training.running import Spoken
from tests.training.saved import run_settings, write_run_file
from tests.training.toy import read_result

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run_file(inputs, tmp_path):
    return write_run_file(tmp_path / "run.yaml", run_settings(inputs, tmp_path / "out"))


@pytest.mark.slow
def test_workers_of_which_one_is_killed_do_what_one_process_does():
    """A sweep, and then jobs; Ray prints nothing as long as no worker is lost."""
    command = [sys.executable, "-m", "benchmarks.cluster", "--workers", "2", "--steps", "18"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    printed = subprocess.run(command, cwd=ROOT, **options).stdout
    before, end_of_sweep, jobs = printed.partition("sweep of 12: as it must be\n")
    assert end_of_sweep, printed
    assert "starting Ray\nstarting 2 workers\n" in before
    assert "raylet" not in before
    assert "six jobs: as in one process\n" in jobs, printed


def node(cpus: int, gpus: int = 0, *, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}


class PlayedQueue(list):
    def __init__(self, actor_options):
        super().__init__()
        self.put, self.qsize = self.append, self.__len__

    def get_nowait_batch(self, number):
        return [self.pop(0) for _ in range(number)]


class PlayedRay:
    """A cluster that does tasks in this process, when asked for results; one job's is lost."""

    class exceptions:  # noqa: N801
        RayError = TimeoutError

    util = SimpleNamespace(queue=SimpleNamespace(Queue=PlayedQueue))

    def __init__(self, lost: str):
        self.lost = lost

    def nodes(self):
        return [node(2)]

    def remote(self, function):
        task = SimpleNamespace(remote=lambda *args: partial(self.do, function, *args))
        return SimpleNamespace(options=lambda **_: task, remote=task.remote)

    def do(self, function, *args):
        if function is workers.train_share and self.lost in {job.name for job in args[1]}:
            raise self.exceptions.RayError("killed")
        return function(*args)

    def wait(self, calls, timeout):
        return calls[:1], calls[1:]

    def get(self, call):
        return call()


def test_jobs_of_a_worker_that_is_lost_for_good_are_left_and_the_others_are_trained(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(workers, "connected", lambda _: nullcontext(PlayedRay("plain")))
    run, spoken = run_settings(inputs, tmp_path / "out"), Spoken()
    with pytest.raises(TrainingError, match="a worker was lost 3 times: killed; when"):
        loraloom.train(run, ray="auto", ray_workers=2, progress=spoken)
    assert read_result(tmp_path / "out/mixture").status == "finished"
    assert not (tmp_path / "out/plain/result.json").exists()
    assert any("mixture: done" in text for text in spoken.messages)


def test_bad_data_leaves_the_results_that_were_to_be_replaced(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "connected", lambda _: nullcontext(PlayedRay("")))
    run = run_settings(inputs, tmp_path / "out")
    loraloom.train(run, ray="auto", ray_workers=2)
    run["jobs"][0]["data"]["dataset"] = "gone.jsonl"
    with pytest.raises(DataError, match=r"job plain: .*gone\.jsonl"):
        loraloom.train(run, ray="auto", overwrite=True)
    assert read_result(tmp_path / "out/plain").status == "finished"
    run["jobs"][0]["data"]["dataset"] = str(inputs / "rows.jsonl")
    assert len(loraloom.train(run, ray="auto", overwrite=True)) == 2


def test_a_sweep_that_is_resumed_has_all_results_and_its_own_settings(
    inputs, tmp_path, monkeypatch
):
    monkeypatch.setattr(workers, "connected", lambda _: nullcontext(PlayedRay("")))
    run, step = run_settings(inputs, tmp_path / "out"), Engine.step
    run["sweep"] = {"job": run.pop("jobs")[0], "parameters": {"seed": [1, 2]}, "max_concurrent": 1}

    def dying(engine):
        if engine.round == 6:
            raise RuntimeError("killed")
        step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", dying)
        with pytest.raises(RuntimeError, match="killed"):
            loraloom.train(run, ray="auto")
    changes = {"sweep.job.train.batch_size=2": r"job plain-000-1: train\.batch_size was 4 and is 2"}
    for change, message in (changes | {"dtype=float64": r"base\.dtype was 'float32'"}).items():
        with pytest.raises(ConfigError, match=message):
            loraloom.train(apply_override(run, change), ray="auto", resume=True)
    data = Path(run["sweep"]["job"]["data"]["dataset"])
    data.write_text((rows := data.read_text()).replace("blue", "red"))
    with pytest.raises(ConfigError, match="of the interrupted run, which has changed"):
        loraloom.train(run, ray="auto", resume=True)
    data.write_text(rows)
    results = loraloom.train(run, ray="auto", resume=True)
    assert [(one.job, one.steps) for one in results] == [("plain-000-1", 4), ("plain-001-2", 4)]


def test_jobs_are_resumed_by_the_worker_that_began_them(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "connected", lambda _: nullcontext(PlayedRay("")))
    run = run_settings(inputs, tmp_path / "out")
    results = loraloom.train(run, ray="auto", ray_workers=2)
    with pytest.raises(ConfigError, match=r"got 1 workers, but .*-1-of-2"):
        loraloom.train(run, ray="auto", ray_workers=1, resume=True)
    assert loraloom.train(run, ray="auto", ray_workers=2, resume=True) == results
    run["jobs"].reverse()
    with pytest.raises(ConfigError, match="restore the order of jobs"):
        loraloom.train(run, ray="auto", ray_workers=2, resume=True)


class BusyRay(PlayedRay):
    """A cluster whose cores are busy for some minutes; `minutes` is the clock."""

    minutes = 0.0

    def wait(self, calls, timeout):
        self.minutes += 0.5
        return super().wait(calls, timeout) if self.minutes > 2 else ([], calls)


def test_workers_that_have_not_begun_are_named_each_minute(inputs, tmp_path, monkeypatch):
    ray, spoken = BusyRay(""), Spoken()
    monkeypatch.setattr(workers, "connected", lambda _: nullcontext(ray))
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: 60 * ray.minutes))
    loraloom.train(run_settings(inputs, tmp_path), ray="auto", ray_workers=2, progress=spoken)
    told = [text for text in spoken.messages if text.startswith("waiting for worker")]
    assert told[:2] == [f"waiting for worker 1, 2 of 2 ({s} s)" for s in (60, 120)]
    assert all("worker 2 of 2" in text for text in told[2:])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ray", "nowhere"], "--ray must be auto or HOST:PORT of a cluster that can be reached"),
        (["--ray", "127.0.0.1:{port}"], "Connection refused; start one with `ray start --head`"),
        (["--ray-workers", "2"], "--ray-workers requires --ray"),
        (["--ray", "auto", "--watch", "in"], "--ray and --watch exclude each other"),
    ],
)
def test_a_fault_is_one_message_before_anything_is_loaded(
    run_file, tmp_path, capsys, words, message
):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    words = [word.format(port=port) for word in words]
    assert cli.main(["train", str(run_file), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_ray_the_message_names_the_extra(run_file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.main(["train", str(run_file), "--ray", "auto"]) == 2
    assert "pip install 'loraloom[ray]'" in capsys.readouterr().err


def test_ranks_and_ray_exclude_each_other(run_file, monkeypatch):
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name, value in zip(names, ("0", "0", "2", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="--ray and torchrun exclude each other"):
        loraloom.train(run_file, ray="auto")


@pytest.mark.parametrize(
    ("nodes", "device", "asked", "size", "resources"),
    [
        ([node(8), node(8)], "auto", None, 2, {"num_cpus": 8, "num_gpus": 0}),
        ([node(8), node(8)], "cpu", 3, 3, {"num_cpus": 4, "num_gpus": 0}),
        ([node(0), node(8), node(8)], "auto", None, 2, {"num_cpus": 8, "num_gpus": 0}),
        ([node(8, 4), node(8, 2)], "auto", None, 6, {"num_cpus": 0, "num_gpus": 1}),
        ([node(8, 4), node(8, 4, alive=False)], "cuda", 3, 3, {"num_cpus": 0, "num_gpus": 1}),
    ],
)
def test_each_worker_has_an_accelerator_or_a_share_of_the_cores(
    nodes, device, asked, size, resources
):
    assert workers.choose_resources(nodes, device, asked) == (size, resources)
    with pytest.raises(ConfigError, match="--ray requires a cluster with cores or accelerators"):
        workers.choose_resources([node(0)], device, asked)
