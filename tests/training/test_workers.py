"""Training on a Ray cluster of this machine, one of whose workers is killed."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

import loraloom
from benchmarks import cluster
from loraloom.cli import main as cli
from loraloom.errors import ConfigError
from loraloom.training import ray_cluster
from tests.training.saved import run_settings, save_inputs, write_run_file


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return save_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def run_file(inputs, tmp_path):
    return write_run_file(tmp_path / "run.yaml", run_settings(inputs, tmp_path / "out"))


@pytest.mark.slow
def test_a_worker_is_killed_and_the_weights_are_those_of_one_process(inputs):
    assert cluster.compare_jobs(inputs, workers=2, steps=60)


@pytest.mark.slow
def test_workers_share_a_sweep(inputs):
    assert cluster.check_sweep(inputs, workers=2)


@pytest.mark.slow
def test_nothing_of_rays_is_printed_and_the_user_is_told_what_it_waits_for(run_file, tmp_path):
    """In a process of its own, as people start it; once more to go on."""
    words = ["train", str(run_file), "--ray", "auto", "--ray-workers", "2"]
    for more in ([], ["--resume"]):
        command = [sys.executable, "-m", "loraloom", *words, *more]
        ran = subprocess.run(command, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert "starting Ray\nstarting 2 workers\n" in ran.stdout
        assert "raylet" not in ran.stdout + ran.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ray", "nowhere"], "--ray must be auto or HOST:PORT of a cluster, got 'nowhere'"),
        (["--ray", "127.0.0.1:{port}"], "--ray must name a Ray cluster that can be reached"),
        (["--ray-workers", "2"], "--ray-workers has no effect without --ray"),
        (["--ray", "auto", "--watch", "in"], "--watch does not go with --ray, whose workers train"),
        (["--ray", "auto", "--device", "cuda:1"], "device must be one of auto, cpu, cuda, xpu"),
        (["--ray", "auto", "--set", "parallel.base=fsdp"], "parallel.base: fsdp needs torchrun"),
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
    with pytest.raises(ConfigError, match="got 2 ranks; start it without torchrun"):
        loraloom.train(run_file, ray="auto")


def node(cpus: int, gpus: int = 0, *, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": float(cpus), "GPU": float(gpus)}}


@pytest.mark.parametrize(
    ("nodes", "device", "asked", "size", "resources"),
    [
        ([node(8), node(8)], "auto", None, 2, {"num_cpus": 8, "num_gpus": 0}),
        ([node(8), node(8)], "cpu", 3, 3, {"num_cpus": 4, "num_gpus": 0}),
        ([node(0), node(8), node(8)], "auto", None, 2, {"num_cpus": 8, "num_gpus": 0}),
        ([node(8, 4), node(8, 2)], "auto", None, 6, {"num_cpus": 0, "num_gpus": 1}),
        ([node(8, 4), node(8, 4, alive=False)], "cuda", 3, 3, {"num_cpus": 0, "num_gpus": 1}),
        ([node(8, 4)], "cpu", None, 1, {"num_cpus": 8, "num_gpus": 0}),
    ],
)
def test_each_worker_has_an_accelerator_or_a_share_of_the_cores(
    nodes, device, asked, size, resources
):
    assert ray_cluster.choose_workers(nodes, device, asked) == (size, resources)


@pytest.mark.parametrize(
    ("nodes", "device", "asked", "counts"),
    [
        ([node(8, 4)], "cuda", 5, "5 workers and 4 accelerators"),
        ([node(8)], "cuda", None, "1 workers and 0 accelerators"),
        ([node(2)], "cpu", 3, "3 workers and 2 cores"),
    ],
)
def test_fewer_devices_than_workers_are_an_error(nodes, device, asked, counts):
    with pytest.raises(ConfigError, match=counts):
        ray_cluster.choose_workers(nodes, device, asked)
