import io
import os
import signal

import pytest
from rich.console import Console

from loraloom.training.job import Job
from loraloom.training.reporting import NOTICE, Interruption, Progress
from tests.training.toy import add_job, toy_config, toy_host


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=120, **options)


def printed(screen: Console) -> str:
    return screen.file.getvalue()


def job(name: str, total_steps: int, step: int = 0) -> Job:
    job = add_job(toy_host(), toy_config(name, max_steps=total_steps))
    job.position.step = step
    return job


def advance(job: Job, tokens: int, loss: float) -> None:
    job.position.step += 1
    job.position.tokens += tokens
    job.position.computed_tokens += tokens * 5 // 4
    job.position.last_loss = loss


def test_a_terminal_gets_a_live_line_for_every_job():
    screen = console(force_terminal=True)
    progress, math = Progress(screen), job("math", 9)
    progress.add(math)
    progress.start()
    progress.add(job("law", 5, step=3))
    advance(math, 320, 1.25)
    progress.update(math)
    progress.measure(math, {"eval/loss": 1.5})
    progress.flush()
    progress.message("law: [done]")
    progress.stop()
    for text in ("math", "1/9", "loss 1.2500", "tokens/s", "ETA", "law", "3/5", "law: [done]"):
        assert text in printed(screen)
    assert "eval/loss 1.5000" in printed(screen)
    assert "math: step 1" not in printed(screen)  # lines of a file


@pytest.mark.parametrize(("interval_s", "steps"), [(1000.0, [1, 4, 5]), (0.0, [1, 2, 3, 4, 5])])
def test_a_file_gets_a_line_of_all_jobs_first_last_and_each_interval(interval_s, steps):
    screen = console()
    progress, jobs = Progress(screen, interval_s), [job("math", 4), job("law", 5)]
    progress.start()
    for one in jobs:
        progress.add(one)
    for _ in range(5):
        for one in jobs:
            if one.position.step < one.total_steps:
                advance(one, 100, 2.0)
                progress.update(one)
        progress.flush()
        if jobs[0].position.step == 4:
            progress.end("math")
    progress.measure(jobs[1], {"eval/loss": 1.5})
    progress.flush()
    progress.stop()
    *lines, measured = printed(screen).splitlines()
    assert [int(line.split("law: step ")[1].split("/")[0]) for line in lines] == steps
    assert lines[0].startswith("math: step 1/4, loss 2.0000; law: step 1/5, loss 2.0000; ")
    assert lines[-1].startswith("law: step 5/5, loss 2.0000; ")
    assert measured == "law: step 5, eval/loss 1.5000"


def test_a_line_of_many_jobs_names_four_and_evaluations_have_a_line_each():
    screen = console()
    progress, jobs = Progress(screen), [job(f"job-{n}", 5) for n in range(12)]
    progress.start()
    for joined in jobs:
        progress.add(joined)
        advance(joined, 100, 2.0)
        progress.update(joined)
        progress.measure(joined, {"eval/loss": 1.5})
    progress.flush()
    progress.stop()
    *measured, line = printed(screen).splitlines()
    assert measured == [f"job-{n}: step 1, eval/loss 1.5000" for n in range(12)]
    assert "; job-3: step 1/5, loss 2.0000; 8 more jobs; " in line
    assert len(line) < 200


class Failing(io.StringIO):
    """Takes a line, and then nothing more."""

    def __init__(self, error: OSError):
        super().__init__()
        self.error = error

    def write(self, text):
        if self.getvalue():
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "pipe"), OSError(28, "full")])
def test_output_that_fails_raises_nothing(error):
    screen = Console(file=Failing(error), width=120)
    progress, math = Progress(screen, interval_s=0.0), job("math", 3)
    progress.start()
    progress.add(math)
    for _ in range(3):
        advance(math, 100, 2.0)
        progress.update(math)
        progress.flush()
    progress.message("more")
    progress.stop()
    assert printed(screen).startswith("math: step 1/3")
    assert "more" not in printed(screen)


def test_output_without_the_letters_of_a_message_escapes_them():
    taken = io.BytesIO()
    Progress(Console(file=io.TextIOWrapper(taken, encoding="ascii"))).message("größer \ud800")
    assert taken.getvalue() == b"gr\\xf6\\xdfer \\ud800\n"


def test_what_terminals_would_obey_is_escaped_and_nothing_is_taken_for_markup():
    screen = console(force_terminal=True)
    Progress(screen).message("a \x1b[31m b [/INST] :fire: [bold]")
    assert printed(screen) == "a \\x1b[31m b [/INST] :fire: [bold]\n"


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
    with Interruption(told.append) as interruption:
        assert not interruption.requested
        press()
        assert interruption.requested
        assert told == [NOTICE]
        with pytest.raises(KeyboardInterrupt):
            press()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, "143"), (signal.SIGHUP, "129")], ids=["term", "hup"]
)
def test_other_signals_ask_as_ctrl_c_does_and_end_with_their_own_code(number, code, hangup):
    with Interruption(print) as interruption:
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
    with Interruption(print):
        pass
    assert signal.getsignal(number) is before
