"""What one of several ranks decides, and all of them do.

A sweep and an inbox go by a clock and files, so the first rank alone has theirs. What it lets its
engine do between two rounds, the others are told and let theirs do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from loraloom.errors import ConfigError
from loraloom.training.builder import JobBuilder
from loraloom.training.checks import check_adds_up
from loraloom.training.engine import Engine
from loraloom.training.job import Job
from loraloom.training.results import JobResult
from loraloom.training.settings import JobConfig
from loraloom.training.step.optimizers import rehearse


class Lead:
    """An engine as the first rank's decisions see it; a single process is the first one."""

    def __init__(self, engine: Engine, builder: JobBuilder):
        self._engine = engine
        self._builder = builder
        self._ranks = engine.host.ranks
        self._heard_of_interruption = False
        self._built: Job | None = None

    @property
    def jobs(self) -> dict[str, Job]:
        """Those that train, by name."""
        return self._engine.jobs

    @property
    def results(self) -> dict[str, JobResult]:
        """What became of the others."""
        return self._engine.results

    @property
    def joined(self) -> set[str]:
        """Names of the jobs that joined a run that had begun."""
        return self._engine.joined

    @property
    def is_interrupted(self) -> bool:
        """Whether this rank was interrupted, or told of another one that was."""
        return self._heard_of_interruption or self._engine.is_interrupted

    def between_steps(self, decide: Callable[[Lead], None]) -> Callable[[Engine], None]:
        """Make a callback for the engine of each rank; `decide` is called on the first one."""

        def callback(_: Engine) -> None:
            if not self._ranks.is_first:
                self._follow()
                return
            decide(self)
            self._tell("go on")

        return callback

    def build(self, config: JobConfig) -> Job:
        """Build a job on all ranks."""
        check_adds_up(config, self._ranks.size)
        rehearse(config.train, config.name)
        self._tell("build", config.model_dump_json())
        return self._build(config)

    def recall(self, name: str) -> bool:
        """See `Engine.recall`."""
        return self._engine.recall(name)

    def add(self, job: Job, *, overwrite: bool = False) -> None:
        """Let the job that was built last join; see `Engine.add`."""
        self._tell("add", sorted(job.milestones))
        self._engine.add(job, overwrite=overwrite)

    def stop(self, name: str, reason: str) -> JobResult:
        """End a job now; see `Engine.stop`."""
        result = self._engine.stop(name, reason)
        self._tell("stop", [name, reason])
        return result

    def save_if_due(self, *, may_wait: bool) -> None:
        """See `Engine.save_if_due`."""
        self._tell("save", may_wait)
        self._engine.save_if_due(may_wait=may_wait)

    def _tell(self, action: str, value: Any = None) -> None:
        told = self._exchange(action, value)
        self._heard_of_interruption = any(is_interrupted for _, _, is_interrupted in told)

    def _exchange(self, action: str = "", value: Any = None) -> Sequence[tuple[str, Any, bool]]:
        return self._ranks.gather((action, value, self._engine.is_interrupted))

    def _follow(self) -> None:
        """Do what the first rank says, until it goes on."""
        while (told := self._exchange()[0])[0] != "go on":
            self._do(*told[:2])

    def _do(self, action: str, value: Any) -> None:
        if action == "build":
            try:
                self._built = self._build(JobConfig.model_validate_json(value))
            except Exception:  # the first rank has it too, and deals with it
                self._built = None
        elif action == "stop":
            self._engine.stop(*value)
        elif action == "save":
            self._engine.save_if_due(may_wait=value)
        elif action == "add" and self._built is not None:
            self._built.milestones = frozenset(value)
            with suppress(Exception):  # as above
                self._engine.add(self._built)

    def _build(self, config: JobConfig) -> Job:
        """Build a job on this rank; what fails here, or comes out otherwise, fails on all."""
        job = fault = None
        try:
            job = self._builder.build(config)
        except Exception as error:
            fault = error
        digest = "" if job is None else job.training_set.digest
        differs = self._ranks.check_alike({config.name: digest})
        if differs and job is not None:
            self._engine.discard(job)
        if fault is not None:
            raise fault
        if differs or job is None:
            raise ConfigError(
                f"job {config.name}: all {self._ranks.size} ranks must have the same data; let "
                "all machines see the same files"
            )
        return job
