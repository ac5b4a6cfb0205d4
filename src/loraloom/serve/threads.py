"""Threads that compute beside the engine's, and end."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

_Value = TypeVar("_Value")


def run_apart(
    work: Callable[[], _Value],
    timeout_s: float | None = None,
    on_end: Callable[[], object] = lambda: None,
) -> _Value:
    """Do something that computes in a thread that ends with it, and return its result.

    On CPUs, GNU's OpenMP gives every thread that computes helpers, which live as long as it does.
    Once there are more of all threads' helpers than cores, they sleep after each operation in
    place of waiting for the next one, and a decoding step takes a third longer. So nobody may have
    helpers but the engine.
    """
    future: Future[_Value] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            on_end()
            future.set_exception(error)
        else:
            on_end()
            future.set_result(result)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return future.result(timeout=0)
