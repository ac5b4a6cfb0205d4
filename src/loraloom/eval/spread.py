"""Evaluations on the workers of a Ray cluster, each of which scores some of the adapters."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from loraloom.errors import AdapterError, LoraloomError
from loraloom.training.ray_cluster import check_worker_device, choose_workers, connected

Part = TypeVar("Part")

_MAX_RETRIES = 2
"""How often a worker that is lost is replaced, by Ray itself."""


def spread(
    score: Callable[[Sequence[str | None]], Part],
    names: Sequence[str | None],
    address: str,
    num_workers: int | None,
    device: str,
    tell: Callable[[str], object],
) -> list[Part]:
    """Let each worker score its share of the adapters."""
    check_worker_device(device)
    with connected(address) as ray:
        size, resources = choose_workers(ray.nodes(), device, num_workers)
        task = ray.remote(_score).options(
            max_retries=_MAX_RETRIES, scheduling_strategy="SPREAD", **resources
        )
        shares = [names[place::size] for place in range(min(size, len(names)))]
        kept = ray.put(score)  # once, as it has the questions in it
        calls = [task.remote(kept, share, Path.cwd()) for share in shares]
        try:
            return _results(ray, calls, tell)
        except BaseException:
            for call in calls:
                ray.cancel(call, force=True)
            raise


def _results(ray: Any, calls: Sequence[Any], tell: Callable[[str], object]) -> list[Any]:
    results: dict[Any, Any] = {}
    while len(results) < len(calls):
        (done,), _ = ray.wait([call for call in calls if call not in results])
        results[done] = _result(ray, done)
        tell(f"{len(results)} of {len(calls)} workers have scored their adapters")
    return [results[call] for call in calls]


def _result(ray: Any, call: Any) -> Any:
    try:
        value = ray.get(call)
    except ray.exceptions.RayTaskError:  # raised by what the worker did: a defect of ours
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().partition("\n")[0]
        raise AdapterError(f"the workers that scored some adapters were lost: {reason}") from None
    if isinstance(value, LoraloomError):
        raise value
    return value


def _score(score: Callable[[Any], Any], names: Sequence[str | None], place: Path) -> Any:
    """Score in a worker's process; errors that are ours are returned, not raised."""
    os.chdir(place)
    try:
        return score(names)
    except LoraloomError as error:
        return error
