"""What every fuzzer holds loraloom to, whatever comes in.

A fuzzer makes a valid artefact, breaks it (`mutated`, `broken_bytes`) and hands it to loraloom
through `survives`. `scripts/fuzz` runs them with thousands of examples; the tests run a few of
each, the same ones each time.
"""

import copy
import os
import signal
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from loraloom.errors import LoraloomError

EXAMPLES = int(os.environ.get("LORALOOM_FUZZ_EXAMPLES", "20"))
SECONDS = 10  # of the processor, as other processes may have most of it

fuzz = settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 20,
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
            the test: another error, or more than 10 s of the processor.
        directory: Holds the same files after an error as before.

    Returns:
        The error; None where the action worked.
    """
    before = _files(directory)
    try:
        with _time_limit():
            action()
    except LoraloomError as error:
        message = str(error)
        assert 0 < len(message) <= 5000, f"a message of {len(message)} characters"
        control = {c for c in message if unicodedata.category(c) in ("Cc", "Cs") and c != "\n"}
        assert not control, f"control characters {control} in {message!r}"
        assert _files(directory) == before, "files were left behind"
        return error
    return None


def _files(directory: Path | None) -> set[str]:
    return set() if directory is None else {str(path) for path in directory.rglob("*")}


@contextmanager
def _time_limit() -> Iterator[None]:
    def expire(signum: int, frame: object) -> None:
        raise AssertionError(f"took more than {SECONDS} s")

    former = signal.signal(signal.SIGPROF, expire)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)


EXTREMES: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**13, 10**300, -(10**13)]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e-45, 1e300, -1e300]),
    st.text(max_size=40),
    st.sampled_from(["", " ", "\0", "\x1b[31m", "[/INST]", "../..", "/", "~nosuchuser"]),
    st.sampled_from(["\ud800", "\u2028", "x" * 300, "1" * 5000, "nan", "null", "-", "{{"]),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)
"""Values that stand where something else was expected."""


@st.composite
def mutated(draw: st.DrawFn, value: Any, most: int = 3) -> Any:
    """Break a JSON-like value in one to `most` places: replaced, removed, added or doubled."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, most))):
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
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


@st.composite
def broken_bytes(draw: st.DrawFn, data: bytes, most: int = 3) -> bytes:
    """Break bytes in one to `most` places: changed, cut out, put in or cut off."""
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, len(data)))
        piece = draw(st.binary(max_size=8))
        kind = draw(st.sampled_from(["change", "cut", "insert", "truncate"]))
        rest = at + (0 if kind == "insert" else draw(st.integers(0, 8)))
        tail = b"" if kind == "truncate" else data[rest:]
        data = data[:at] + (b"" if kind in ("cut", "truncate") else piece) + tail
    return data
