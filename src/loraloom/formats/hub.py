"""Where an adapter's files are, a directory here or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from loraloom.config.text import local_path
from loraloom.errors import FormatError
from loraloom.formats.disk import ADAPTER_FILES, CARD_FILE

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
# The first is that of the HTTP client, which huggingface_hub has changed: no connection, say.
_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], HFValidationError, OSError)


def find_adapter(path_or_hub_id: str | Path) -> Path:
    """Give the directory of an adapter, downloaded first if it is a hub id (`owner/name`)."""
    path = local_path(path_or_hub_id, "an adapter", FormatError)
    if path.exists():
        return path
    if not isinstance(path_or_hub_id, str) or not HUB_ID.fullmatch(path_or_hub_id):
        raise FormatError(f"an adapter must be a directory or a hub id, there is no {path}")
    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=[*ADAPTER_FILES, CARD_FILE]))
    except _ERRORS as error:
        raise FormatError(
            f"`{path_or_hub_id}` is no directory here, and it can't be downloaded from the Hugging "
            f"Face Hub ({_reason(error)}); check the name, the network and, for a private or gated "
            "repository, `hf auth login`"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
