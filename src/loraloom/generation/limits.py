"""What an engine may use, and how it refuses more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loraloom.errors import AdapterError, LoraloomError

PromptCache = Literal["own", "shared", "off"]


@dataclass(frozen=True)
class EngineLimits:
    """What an engine may use.

    Args:
        max_rows: Most completions at once.
        cache_tokens: Size of the key-value cache: rows times tokens of the longest.
        prefill_tokens: Most tokens of prompts that are read between two decoding steps.
        max_waiting: Most requests that wait.
        max_request_s: Seconds after which a request fails, waiting included.
        prompt_cache: Who may use what is kept of a prompt: whoever sent it, or all; then the time
            to the first token says what others have sent. With `off`, nothing is kept.
    """

    max_rows: int = 32
    cache_tokens: int = 32768
    prefill_tokens: int = 256
    max_waiting: int = 256
    max_request_s: float = 600.0
    prompt_cache: PromptCache = "own"


class QueueFullError(LoraloomError):
    """Too many requests wait; `retry_after_s` says when fewer may."""

    def __init__(self, message: str = "", retry_after_s: int = 1):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoppingError(LoraloomError):
    """The engine takes no more requests."""


class NoRoutersError(LoraloomError):
    """A request asks for the routing of a model that has no routers."""


class OutOfTimeError(LoraloomError):
    """A request took longer than it may."""


class NotFiniteError(AdapterError):
    """An adapter's weights, or the base model's, have become infinite or NaN."""
