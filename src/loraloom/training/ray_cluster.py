"""The Ray cluster that workers are on, and what each of them takes of it."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from loraloom.errors import ConfigError, shown

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # tells nobody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",  # at Ray's 15, workers hardly run where others keep the cores busy
}
"""What Ray reads when it is imported."""
_LOOPBACK = "127.0.0.1"
_OBJECT_STORE_BYTES = 80_000_000
"""Almost the least that Ray takes: nothing large goes through it."""
_REACH_S = 5.0
_DEVICES = ("auto", "cpu", "cuda", "xpu")


@contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Connect to a cluster, and give Ray's module.

    A connection that this process has is used, and left as it is.
    """
    ray = _import_ray()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(ray, address)
    printed, ray._private.worker.print_to_stdstream = ray._private.worker.print_to_stdstream, _mute
    try:
        yield ray
    finally:
        ray._private.worker.print_to_stdstream = printed
        if is_ours:
            ray.shutdown()
            for number, handler in handlers.items():  # Ray has put its own in their place
                signal.signal(number, handler)


def _mute(*_: Any, **__: Any) -> None:
    """Keep what Ray says of lost workers off the terminal: the run says so, and Ray's logs too."""


def _import_ray() -> ModuleType:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigError(
            "--ray needs Ray, which is not installed: pip install 'loraloom[ray]'"
        ) from error
    return ray


def _connect(ray: ModuleType, address: str) -> None:
    """Connect this process to a cluster, or start one."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    named = "" if address == "auto" else address
    if named:
        _check_reachable(named)
    elif _runs_here(ray):
        named = "auto"
    try:
        if named:
            ray.init(address=named, **quiet)
            return
        with _on_this_machine_alone():
            ray.init(
                address="local",
                _node_ip_address=_LOOPBACK,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                **quiet,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise _no_cluster(named or address, error) from None


def _runs_here(ray: ModuleType) -> bool:
    """Whether a cluster runs on this machine that others may join: another run's is its own."""
    try:
        _check_reachable(ray._private.services.canonicalize_bootstrap_address("auto") or "")
    except (ConfigError, ConnectionError):
        return False
    return True


@contextmanager
def _on_this_machine_alone() -> Iterator[None]:
    """Let Ray take the loopback address as it is, not for the machine's own on the network.

    Its servers listen to that alone then, and else to everybody.
    """
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _check_reachable(address: str) -> None:
    """Check that somebody listens there: Ray would end the process after a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535 or "/" in host:
        raise ConfigError(f"--ray must be auto or HOST:PORT of a cluster, got {shown(address)}")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise _no_cluster(address, error) from None


def _no_cluster(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"--ray must name a Ray cluster that can be reached, got {shown(address)}: "
        f"{first_line(error)}; start one with `ray start --head`, or give auto"
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_worker_device(device: str) -> None:
    """Raise a ConfigError if a device is one of several, and not whatever a worker is given."""
    if device not in _DEVICES:
        raise ConfigError(
            f"device must be one of {', '.join(_DEVICES)} with --ray, as each worker takes a "
            f"device of its own, got {device}"
        )


def choose_workers(
    nodes: Sequence[dict[str, Any]], device: str, num_workers: int | None
) -> tuple[int, dict[str, int]]:
    """Choose how many workers to start, and what each takes."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    gpus, cpus = ([int(one.get(kind, 0)) for one in alive] for kind in ("GPU", "CPU"))
    if device in ("cuda", "xpu") or (device == "auto" and sum(gpus)):
        size, most, kind = num_workers or sum(gpus), sum(gpus), "accelerators"
        resources: dict[str, int] = {"num_cpus": 0, "num_gpus": 1}
    else:
        size, most, kind = num_workers or sum(own > 0 for own in cpus), sum(cpus), "cores"
        resources = {"num_cpus": _cores_each(cpus, size), "num_gpus": 0}
    if size > most or not size:
        raise ConfigError(
            f"each worker needs a device of its own, got {max(size, 1)} workers and {most} "
            f"{kind} in the cluster; give a lower --ray-workers, or another --device"
        )
    return size, resources


def _cores_each(cpus: Sequence[int], num_workers: int) -> int:
    """Return the most cores that each of so many workers can have."""
    for cores in range(max(cpus, default=1), 1, -1):
        if sum(own // cores for own in cpus) >= num_workers:
            return cores
    return 1
