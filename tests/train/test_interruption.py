from __future__ import annotations

import os
import signal
import threading

import pytest

from loraloom.train.interruption import Interruption


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_ctrl_c_is_a_request_and_the_second_ends_at_once():
    told: list[str] = []
    with Interruption(lambda: told.append("stopping")) as interruption:
        assert not interruption.requested
        press()
        assert interruption.requested
        assert told == ["stopping"]
        with pytest.raises(KeyboardInterrupt):
            press()


def test_ctrl_c_is_its_old_self_afterwards():
    before = signal.getsignal(signal.SIGINT)
    with Interruption(lambda: None):
        pass
    assert signal.getsignal(signal.SIGINT) is before


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
