from __future__ import annotations

import io

import pytest
from rich.console import Console

from loraloom.training.job import Job, Position
from loraloom.training.progress import Progress
from tests.training.toy import add_job, toy_config, toy_host


def console(**options) -> Console:
    return Console(file=io.StringIO(), width=120, **options)


def printed(screen: Console) -> str:
    return screen.file.getvalue()


def job(name: str, total_steps: int, step: int = 0) -> Job:
    job = add_job(toy_host(), toy_config(name, max_steps=total_steps))
    job.position.step = step
    return job


def shown(job: Job) -> tuple[str, int, Position]:
    return job.name, job.total_steps, job.position


def advance(job: Job, tokens: int, loss: float) -> None:
    job.position.step += 1
    job.position.tokens += tokens
    job.position.computed_tokens += tokens * 5 // 4
    job.position.last_loss = loss


def test_a_terminal_gets_a_live_line_for_every_job():
    screen = console(force_terminal=True)
    progress, math = Progress(screen), job("math", 9)
    progress.add(*shown(math))
    progress.start()
    progress.add(*shown(job("law", 5, step=3)))
    advance(math, 320, 1.25)
    progress.update(*shown(math))
    progress.message("law: [done]")
    progress.stop()
    for text in ("math", "1/9", "loss 1.2500", "tokens/s", "ETA", "law", "3/5", "law: [done]"):
        assert text in printed(screen)


def test_a_file_gets_lines_every_few_seconds_and_at_the_end():
    screen = console()
    progress, math = Progress(screen, interval_s=1000.0), job("math", 3)
    progress.start()
    progress.add(*shown(math))
    for _ in range(3):
        advance(math, 100, 2.0)
        progress.update(*shown(math))
    progress.stop()
    (line,) = printed(screen).splitlines()
    assert line.startswith("math: step 3/3, loss 2.0000, ")

    screen, math = console(), job("math", 3)
    often = Progress(screen, interval_s=0.0)
    often.add(*shown(math))
    advance(math, 100, 2.0)
    often.update(*shown(math))
    assert "step 1/3" in printed(screen)


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
    progress.add(*shown(math))
    for _ in range(3):
        advance(math, 100, 2.0)
        progress.update(*shown(math))
    progress.message("more")
    progress.stop()
    assert printed(screen).startswith("math: step 1/3")
    assert "more" not in printed(screen)


def test_output_without_the_letters_of_a_message_escapes_them():
    taken = io.BytesIO()
    screen = Console(file=io.TextIOWrapper(taken, encoding="ascii"))
    Progress(screen).message("größer \ud800")
    assert taken.getvalue() == b"gr\\xf6\\xdfer \\ud800\n"


def test_what_terminals_would_obey_is_escaped_and_nothing_is_taken_for_markup():
    screen = console(force_terminal=True)
    Progress(screen).message("a \x1b[31m b [/INST] :fire: [bold]")
    assert printed(screen) == "a \\x1b[31m b [/INST] :fire: [bold]\n"
