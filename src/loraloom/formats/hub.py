"""Where an adapter's files are: a directory here, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from loraloom.adapters.files import CONFIG_FILE
from loraloom.config.paths import local_path
from loraloom.errors import FormatError
from loraloom.formats.contents import CARD_FILE, PICKLE_FILE, WEIGHTS_FILE

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")


def find_adapter(path_or_hub_id: str | Path) -> Path:
    """Give the directory of an adapter, downloaded first if it is a Hub id (`owner/name`).

    Raises:
        FormatError: If there is no such directory and no such repository within reach.
    """
    path = local_path(path_or_hub_id, "an adapter", FormatError)
    if path.exists():
        return path
    if not isinstance(path_or_hub_id, str) or not _HUB_ID.fullmatch(path_or_hub_id):
        raise FormatError(f"an adapter must be a directory or a Hub id, there is no {path}")
    return _download(path_or_hub_id)


def _download(hub_id: str) -> Path:
    wanted = [CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE, CARD_FILE]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FormatError(
            f"`{hub_id}` is no directory here, and it can't be got from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}); check the name, the network and, for a private "
            "or gated repository, `hf auth login`"
        ) from error
