"""An output whose faults end nothing."""

from __future__ import annotations

import io
from contextlib import suppress
from typing import Any


class EnduringOutput(io.TextIOBase):
    """A stream that drops what a closed pipe or a full disk does not take."""

    def __init__(self, stream: Any):
        self.stream = stream

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the stream."""
        return self.stream.encoding or "utf-8"

    def write(self, text: str) -> int:
        """Write a text as far as that is possible."""
        with suppress(OSError, ValueError):  # ValueError: it was closed
            encodable = text.encode(self.encoding, "backslashreplace").decode(self.encoding)
            self.stream.write(encodable)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        with suppress(OSError, ValueError):
            self.stream.flush()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self.stream.isatty()

    def fileno(self) -> int:
        """Return the stream's descriptor."""
        return self.stream.fileno()
