"""When a run writes snapshots: where one is due, and at an interruption."""

from __future__ import annotations

import time
from collections.abc import Callable

from loraloom.errors import TrainingError

SNAPSHOT_RETRY_S = 60.0


class Saver:
    """Writes snapshots when they are due. One that can't be written ends no run.

    Args:
        write: Writes one; raises a TrainingError if it can't.
        say: Tells the user.

    Attributes:
        is_due: Whether something happened that a snapshot should have.
    """

    def __init__(self, write: Callable[[], None], say: Callable[[str], None]):
        self.is_due = False
        self._write = write
        self._say = say
        self._not_before = 0.0

    def save_if_due(self, *, may_wait: bool) -> None:
        """Write a snapshot where one is due; if that fails, wait with the next try.

        Args:
            may_wait: Whether the run goes on, so that there will be a later try.
        """
        if not self.is_due or (may_wait and time.monotonic() < self._not_before):
            return
        try:
            self._write()
        except TrainingError as error:
            self._not_before = time.monotonic() + SNAPSHOT_RETRY_S
            self._say(
                f"warning: {error}; the one before is kept, the next try is in "
                f"{SNAPSHOT_RETRY_S:.0f} s"
            )

    def save_for_later(self) -> None:
        """Write a snapshot at the end of a run that was interrupted."""
        try:
            self._write()
            self._say("saved; --resume goes on from here")
        except TrainingError as error:
            self._say(f"error: {error}; --resume goes on from the one before")
