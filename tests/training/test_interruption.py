from __future__ import annotations

import os
import signal

import pytest

from loraloom.training.progress import Interruption


def press(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def hangup():
    """Let SIGHUP be what it is by default, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_the_first_ctrl_c_is_a_request_and_the_second_ends_at_once():
    told: list[str] = []
    with Interruption(lambda: told.append("stopping")) as interruption:
        assert not interruption.requested
        press()
        assert interruption.requested
        assert told == ["stopping"]
        with pytest.raises(KeyboardInterrupt):
            press()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, "143"), (signal.SIGHUP, "129")], ids=["term", "hup"]
)
def test_other_signals_ask_as_ctrl_c_does_and_end_with_their_own_code(number, code, hangup):
    with Interruption(lambda: None) as interruption:
        press(number)
        assert interruption.requested
        with pytest.raises(SystemExit, match=code):
            interruption.end()
        if number == signal.SIGHUP:
            press(number)  # the kernel's, after the shell's
        else:
            with pytest.raises(SystemExit, match=code):
                press(number)
        with pytest.raises(KeyboardInterrupt):
            press(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_are_their_old_selves_afterwards(number):
    before = signal.getsignal(number)
    with Interruption(lambda: None):
        pass
    assert signal.getsignal(number) is before
