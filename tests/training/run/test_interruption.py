from __future__ import annotations

import os
import signal
import threading

import pytest

from loraloom.training.run.interruption import Interruption


def press(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


def test_the_first_ctrl_c_is_a_request_and_the_second_ends_at_once():
    told: list[str] = []
    with Interruption(lambda: told.append("stopping")) as interruption:
        assert not interruption.requested
        press()
        assert interruption.requested
        assert told == ["stopping"]
        with pytest.raises(KeyboardInterrupt):
            press()


def test_sigterm_asks_as_ctrl_c_does_and_ends_with_143():
    with Interruption(lambda: None) as interruption:
        press(signal.SIGTERM)
        assert interruption.requested
        with pytest.raises(SystemExit, match="143"):
            interruption.end()
        with pytest.raises(SystemExit, match="143"):
            press(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            press(signal.SIGINT)


def test_a_terminal_that_is_being_written_to_raises_nothing():
    def tell() -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with Interruption(tell) as interruption:
        press()
        assert interruption.requested


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_their_old_selves_afterwards(number):
    before = signal.getsignal(number)
    with Interruption(lambda: None):
        pass
    assert signal.getsignal(number) is before


def test_other_threads_leave_signals_alone():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter() -> None:
        with Interruption(lambda: None):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before]
