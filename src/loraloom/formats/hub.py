"""Where an adapter's files are, a directory here or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from loraloom.config.text import local_path
from loraloom.errors import FormatError
from loraloom.formats.contents import ADAPTER_FILES, CARD_FILE
from loraloom.formats.disk import check_all_read

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_HTTP_ERROR: type[Exception] = HfHubHTTPError.__bases__[0]
"""Of the HTTP client, which huggingface_hub has changed: no connection, for instance."""


def find_adapter(path_or_hub_id: str | Path) -> Path:
    """Give the directory of an adapter, downloaded first if it is a Hub id (`owner/name`)."""
    path = local_path(path_or_hub_id, "an adapter", FormatError)
    if path.exists():
        return path
    if not isinstance(path_or_hub_id, str) or not HUB_ID.fullmatch(path_or_hub_id):
        raise FormatError(f"an adapter must be a directory or a Hub id, there is no {path}")
    return _download(path_or_hub_id)


def _download(hub_id: str) -> Path:
    check_all_read(hub_id, _listed(hub_id))
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*ADAPTER_FILES, CARD_FILE]))
    except (_HTTP_ERROR, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FormatError(
            f"`{hub_id}` is no directory here, and it can't be got from the Hugging Face Hub "
            f"({type(error).__name__}: {reason}); check the name, the network and, for a private "
            "or gated repository, `hf auth login`"
        ) from error


def _listed(hub_id: str) -> list[str]:
    """List the files at the top of a repository; none where it is out of reach.

    What the cache holds then was listed when it came.
    """
    try:
        return [name for name in HfApi().list_repo_files(hub_id) if "/" not in name]
    except (_HTTP_ERROR, HFValidationError, OSError):
        return []


def upload_adapter(directory: Path, hub_id: str, *, private: bool) -> str:
    """Upload an adapter's directory to a repository, which is made if it isn't there."""
    if not HUB_ID.fullmatch(hub_id):
        raise FormatError(f"a Hub id must be owner/name, got {hub_id!r}")
    api = HfApi()
    try:
        repository = api.create_repo(hub_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=hub_id, folder_path=directory, commit_message="Upload an adapter of loraloom"
        )
    except (_HTTP_ERROR, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FormatError(
            f"the adapter can't be put on the Hugging Face Hub as `{hub_id}` "
            f"({type(error).__name__}: {reason}); check the network, HF_HUB_OFFLINE, and that "
            "`hf auth login` has given a token that may write there. Without a network, save the "
            "adapter and upload its directory later: `hf upload OWNER/NAME DIRECTORY`"
        ) from error
    return str(repository)
