"""What the server's log keeps of requests that failed."""

from __future__ import annotations

import logging

import torch

from loraloom.errors import LoraloomError

_log = logging.getLogger(__name__)


def log_failure(what: str, error: Exception) -> None:
    """Keep the traceback of an error, unless it is an answer, or tried again."""
    is_expected = isinstance(error, (LoraloomError, torch.OutOfMemoryError))
    level = logging.INFO if is_expected else logging.ERROR
    _log.log(level, what, exc_info=error)
