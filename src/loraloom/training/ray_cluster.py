"""A Ray cluster: how to connect to it, and what its workers do at once."""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from loraloom.errors import ConfigError, LoraloomError, shown

# How often Ray itself starts a lost worker again.
RESTARTS = 2
# What Ray reads when it is imported.
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",  # tells nobody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a warning
    "RAY_DEDUP_LOGS": "0",
    "RAY_worker_niceness": "0",  # at Ray's 15, workers hardly run where others keep the cores busy
}
# Almost the least that Ray takes: nothing large goes through it.
_OBJECT_STORE_BYTES = 80_000_000
_REACH_S = 5.0
_DEVICES = ("auto", "cpu", "cuda", "xpu")


@contextmanager
def connected(address: str) -> Iterator[ModuleType]:
    """Connect to a cluster, and give Ray's module.

    A connection that this process has is used, and left as it is.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    try:
        import ray
        import ray.exceptions
        from ray._private import worker
    except ImportError as error:
        raise ConfigError(
            "--ray needs Ray, which is not installed: pip install 'loraloom[ray]'"
        ) from error
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    is_ours = not ray.is_initialized()
    if is_ours:
        _connect(ray, address)
    # What Ray says of lost workers stays off the terminal: the run says so, and Ray's logs too.
    printed, worker.print_to_stdstream = worker.print_to_stdstream, lambda *_, **__: None
    try:
        yield ray
    finally:
        worker.print_to_stdstream = printed
        if is_ours:
            ray.shutdown()
            for number, handler in handlers.items():  # Ray has put its own in their place
                signal.signal(number, handler)


def _connect(ray: Any, address: str) -> None:
    """Connect this process to a cluster, or start one for itself."""
    from ray._private import ray_constants

    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    may_serve_others = ray_constants.ENABLE_RAY_CLUSTER
    try:
        if address != "auto":
            _check_reachable(address)
            options["address"] = address
        else:  # one that runs here and that others may join: another run's is its own
            with suppress(ConfigError, OSError):
                found = ray._private.services.canonicalize_bootstrap_address("auto")
                _check_reachable(found or "")
                options["address"] = "auto"
        if "address" not in options:
            # Without this, Ray takes the machine's address on the network in place of the loopback,
            # and its servers listen to everybody.
            ray_constants.ENABLE_RAY_CLUSTER = False
            options |= {"address": "local", "_node_ip_address": "127.0.0.1"}
            options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
        ray.init(**options)
    except (RuntimeError, ValueError, OSError) as error:
        if isinstance(error, LoraloomError):
            raise
        raise ConfigError(
            f"--ray must name a Ray cluster that can be reached, got {shown(address)}: "
            f"{first_line(error)}; start one with `ray start --head`, or give auto"
        ) from None
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = may_serve_others


def _check_reachable(address: str) -> None:
    """Raise an OSError where nobody listens: Ray would end the process after a minute."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535 or "/" in host:
        raise ConfigError(f"--ray must be auto or HOST:PORT of a cluster, got {shown(address)}")
    socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()


def first_line(error: BaseException) -> str:
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
        resources = {"num_cpus": 0, "num_gpus": 1}
    else:
        size, most, kind = num_workers or sum(own > 0 for own in cpus), sum(cpus), "cores"
        shares = range(max(cpus, default=1), 0, -1)  # the most cores that each can have
        cores = next((n for n in shares if sum(own // n for own in cpus) >= size), 1)
        resources = {"num_cpus": cores, "num_gpus": 0}
    if size > most or not size:
        raise ConfigError(
            f"each worker needs a device of its own, got {max(size, 1)} workers and {most} "
            f"{kind} in the cluster; give a lower --ray-workers, or another --device"
        )
    return size, resources
