"""What every fuzzer holds loraloom to, whatever comes in.

A fuzzer makes a valid artefact, breaks it (`mutated`, `broken_bytes`) and hands it to loraloom
through `survives`. `scripts/fuzz` runs the fuzzers of this directory with thousands of examples;
the tests run 50 of each, the same ones each time.
"""

from __future__ import annotations

import copy
import os
import resource
import signal
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from loraloom.errors import LoraloomError

EXAMPLES = int(os.environ.get("LORALOOM_FUZZ_EXAMPLES", "50"))
SECONDS = 10  # of the processor, as other processes may have most of it
WAITING_SECONDS = 300  # of the clock, where nothing is computed
SPARE_MEMORY = 1 << 30  # bytes that one example may take beside what the process has

fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 50,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
"""The decorator of a fuzzer, below `@given`."""


def survives(action: Callable[[], object], directory: Path | None = None) -> LoraloomError | None:
    """Run what a broken artefact is handed to, and hold it to one way out.

    Args:
        action: Works, or raises a `LoraloomError` whose message can be shown. Anything else fails
            the test: another error, more than 10 s of the processor, more than 1 GiB.
        directory: Holds the same files after an error as before.

    Returns:
        The error; None where the action worked.
    """
    before = _files(directory)
    try:
        with _time_limit(), _memory_limit():
            action()
    except LoraloomError as error:
        assert_presentable(str(error))
        assert _files(directory) == before, "files were left behind"
        return error
    return None


def _files(directory: Path | None) -> set[str]:
    return set() if directory is None else {str(path) for path in directory.rglob("*")}


def assert_presentable(message: str) -> None:
    """Check that a message can be shown to people on a terminal."""
    assert 0 < len(message) <= 5000, f"a message of {len(message)} characters"
    control = {c for c in message if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"}
    assert not control, f"control characters {control} in {message!r}"


@contextmanager
def _time_limit() -> Iterator[None]:
    with (
        _alarm(signal.ITIMER_PROF, signal.SIGPROF, SECONDS),
        _alarm(signal.ITIMER_REAL, signal.SIGALRM, WAITING_SECONDS),
    ):
        yield


@contextmanager
def _alarm(timer: int, number: int, seconds: float) -> Iterator[None]:
    def expire(signum: int, frame: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    former = signal.signal(number, expire)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(number, former)


@contextmanager
def _memory_limit() -> Iterator[None]:
    former = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + SPARE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


EXTREMES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**13, 10**300, -(10**13)]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-45, 1e300, -1e300]),
    st.text(max_size=40),
    st.sampled_from(["", " ", "\0", "\x1b[31m", "[/INST]", "[bold]", "../..", "/", "~nosuchuser"]),
    st.sampled_from(["\ud800", "\u2028", "x" * 300, "1" * 5000, "nan", "NaN", "null", "-", "{{"]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.sampled_from([50, 500]).map(_nested),
)
"""Values that stand where something else was expected."""


@st.composite
def mutated(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """Break a JSON-like value in one to `most` places: replaced, removed, added or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
        value = _mutate(draw, value)
    return value


def _mutate(draw: st.DrawFn, value: Any) -> Any:
    places = list(_places(value))
    if not places:
        return draw(EXTREMES)
    parent, key = draw(st.sampled_from(places))
    kind = draw(st.sampled_from(["replace", "replace", "remove", "add", "double"]))
    if kind == "remove":
        del parent[key]
    elif kind == "add" and isinstance(parent, dict):
        parent[draw(st.text(max_size=20))] = draw(EXTREMES)
    elif kind == "double" and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(parent[key]))
    else:
        parent[key] = draw(EXTREMES)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = (
        list(value.items())
        if isinstance(value, dict)
        else list(enumerate(value))
        if isinstance(value, list)
        else []
    )
    for key, child in items:
        yield value, key
        yield from _places(child)


@st.composite
def broken_bytes(draw: st.DrawFn, data: bytes, most: int = 3) -> bytes:
    """Break bytes in one to `most` places: changed, cut out, put in or cut off."""
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 8))
        piece = draw(st.binary(max_size=8))
        kind = draw(st.sampled_from(["change", "cut", "insert", "truncate"]))
        tail = b"" if kind == "truncate" else data[at + (0 if kind == "insert" else length) :]
        data = data[:at] + (b"" if kind in ("cut", "truncate") else piece) + tail
    return data
