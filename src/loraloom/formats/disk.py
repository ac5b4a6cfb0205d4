"""An adapter's raw files: read, and written so that a crash leaves the old ones or the new."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraloom.config.text import local_path, read_json
from loraloom.durable import remove_leftovers, staging, sync, write_directory
from loraloom.errors import AdapterError, FormatError, names_in, shown

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
CARD_FILE = "README.md"
SIDECAR_WEIGHTS = "mixlora_model.safetensors"
# axolotl's files that are read beside these; the latter has the run's settings.
SIDECAR_SETTINGS = ("config.yml", "config.yaml")
# All that an adapter may be read from.
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, PICKLE_FILE, SIDECAR_WEIGHTS, *SIDECAR_SETTINGS)

# What would be read instead of new files, or beside them.
_STALE_FILES = (PICKLE_FILE, SIDECAR_WEIGHTS)
# All that saving an adapter replaces.
SAVED_FILES = (CONFIG_FILE, WEIGHTS_FILE, *_STALE_FILES, CARD_FILE)
# Age at which files that lie aside are no longer being written by anybody.
_ABANDONED_S = 3600.0
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
# The first is that of the HTTP client, which huggingface_hub has changed: no connection, say.
_HUB_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], HFValidationError, OSError)


def find_adapter(path_or_hub_id: str | Path) -> Path:
    """Give the directory of an adapter, downloaded first if it is a Hub ID (`owner/name`)."""
    path = local_path(path_or_hub_id, "an adapter", FormatError)
    if path.exists():
        return path
    if not isinstance(path_or_hub_id, str) or not HUB_ID.fullmatch(path_or_hub_id):
        text = shown(str(path))
        raise FormatError(f"an adapter must be an existing directory or a Hub ID, got {text}")
    try:
        return Path(snapshot_download(path_or_hub_id, allow_patterns=[*ADAPTER_FILES, CARD_FILE]))
    except _HUB_ERRORS as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise FormatError(
            f"`{path_or_hub_id}` is not a local directory and cannot be downloaded from the "
            f"Hugging Face Hub ({reason}); check the name, the network and, for a private or gated "
            "repository, `hf auth login`"
        ) from error


class Sidecar(NamedTuple):
    """What axolotl keeps of a mixture beside PEFT's two files; see foreign.py."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    """Of the run; empty where no file has them."""


@dataclass(frozen=True)
class AdapterFiles:
    """The files of an adapter, before anything in them is understood."""

    config: dict[str, Any]
    """Fields of adapter_config.json; null is as good as no field."""
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    """The header of the safetensors file."""
    source: str = "the adapter"
    """Where they came from, for messages."""
    sidecar: Sidecar | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the method that the user gives: what files lack, or in place of theirs."""

    def error(self, message: str) -> FormatError:
        return FormatError(f"{self.source}: {message}")

    def renamed(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        return {names[old]: tensor for old, tensor in self.tensors.items() if old in names}

    def section(self, name: str) -> dict[str, Any]:
        """Take a field that holds fields, {} where it is missing."""
        section = self.config.get(name, {})
        if not isinstance(section, dict):
            raise self.error(f"`{name}` in {CONFIG_FILE} must be a mapping, got {shown(section)}")
        return section

    def targets(self) -> list[str]:
        """Name the target modules; a pattern (a string) is left to the tensors."""
        modules = self.config.get("target_modules")
        if isinstance(modules, dict):  # before 0.5 of the reference
            return [name for name, is_wanted in modules.items() if is_wanted]
        return modules if isinstance(modules, list) else []


def read_files(directory: Path) -> AdapterFiles:
    """Read adapter_config.json and the weights, from safetensors or else from a pickle."""
    path = directory / CONFIG_FILE
    if not path.is_file():
        is_model = (directory / "config.json").is_file()
        hint = "a base model, not an adapter" if is_model else "not an adapter, or incomplete"
        raise FormatError(f"{directory} has no {CONFIG_FILE} ({hint}); name an adapter's directory")
    config = read_json(path, FormatError)
    if not isinstance(config, dict):
        raise FormatError(f"{path} must contain a JSON object, got {type(config).__name__}")
    # PEFT writes null for what is unset.
    config = {name: value for name, value in config.items() if value is not None}
    weights, pickled, metadata = directory / WEIGHTS_FILE, directory / PICKLE_FILE, {}
    if weights.is_file():
        tensors, metadata = _read_safetensors(weights)
    elif pickled.is_file():
        tensors = _read_pickle(pickled)
    else:
        raise FormatError(f"{directory} contains neither {WEIGHTS_FILE} nor {PICKLE_FILE}")
    return AdapterFiles(config, tensors, metadata, str(directory), _read_sidecar(directory))


def _read_sidecar(directory: Path) -> Sidecar | None:
    """Read what axolotl has beside the weights; its settings may be above a checkpoint of a run."""
    if not (directory / SIDECAR_WEIGHTS).is_file():
        return None
    places = [directory, *([directory.parent] if directory.name.startswith("checkpoint-") else [])]
    files = [place / name for place in places for name in SIDECAR_SETTINGS]
    path = next((path for path in files if path.is_file()), None)
    try:
        settings = path and yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise FormatError(f"{path} can't be read: {error}") from error
    tensors, _ = _read_safetensors(directory / SIDECAR_WEIGHTS)
    return Sidecar(tensors, settings if isinstance(settings, dict) else {})


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return _plain_tensors(path, load_file(path)), metadata
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a safetensors file: {error}; download a copy") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a flat dict of tensors; anything that would run code is refused."""
    try:
        # weights_only builds tensors and plain values alone, whatever the pickle calls.
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is broken in a pickle decides which error it is
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path} can't be read as a dict of tensors: {reason}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise FormatError(f"{path} must contain a flat dict of tensors by name")
    plain_tensors = _plain_tensors(path, tensors)
    return {name: tensor.detach().contiguous() for name, tensor in plain_tensors.items()}


def _plain_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as they came; a FormatError if some are no numbers in memory."""
    # A pickle may hold a tensor whose numbers are all one place in memory: copied, it fills it.
    odd = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype not in _DTYPES
        or tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.nbytes > tensor.untyped_storage().nbytes()
    ]
    if odd:
        raise FormatError(
            f"{path}: tensors must be floating point (float64, float32, float16 or bfloat16), "
            f"dense and stored in full, got others in {names_in(odd)}"
        )
    return tensors


def refuse_to_overwrite(directory: Path) -> None:
    """Raise an AdapterError if a directory has an adapter's files already."""
    present = [name for name in SAVED_FILES if (directory / name).exists()]
    if present:
        raise AdapterError(
            f"{directory} already contains {names_in(present)}; save elsewhere, or pass overwrite"
        )


def replace_files(directory: Path, files: AdapterFiles, card: str) -> None:
    """Put an adapter's three files into a directory that may hold others.

    They are written aside, synced to the disk and renamed, adapter_config.json last. If the
    process dies, the directory holds the old adapter, the new one, or no adapter_config.json
    (never the new weights under another old configuration).
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory, older_than_s=_ABANDONED_S)
        with staging(directory) as aside:
            _fill(aside, files, card)
            for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE):
                sync(aside / name)
            _publish(aside, directory)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"the adapter can't be written to {directory}: {error}") from error


def write_new(directory: Path, files: AdapterFiles, card: str, *, pickled: bool = False) -> None:
    """Write an adapter to a directory that isn't there yet; it appears whole."""
    if directory.exists():
        raise AdapterError(f"{directory} already exists; convert to a new directory")
    try:
        write_directory(directory, lambda aside: _fill(aside, files, card, pickled))
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"the adapter can't be written to {directory}: {error}") from error


def _fill(aside: Path, files: AdapterFiles, card: str, pickled: bool = False) -> None:
    config = json.dumps(files.config, indent=2, ensure_ascii=False, allow_nan=False)
    (aside / CONFIG_FILE).write_text(config + "\n", "utf-8", "replace")
    (aside / CARD_FILE).write_text(card, "utf-8", "replace")
    # Copied to the CPU, so that experts that are views of one tensor don't share storage.
    tensors = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in files.tensors.items()}
    if pickled:
        torch.save(tensors, aside / PICKLE_FILE)
    else:
        save_file(tensors, aside / WEIGHTS_FILE, metadata=files.metadata)
        # safetensors makes files 0600, which a server's user could not read.
        shutil.copymode(aside / CONFIG_FILE, aside / WEIGHTS_FILE)


def _publish(aside: Path, directory: Path) -> None:
    old, new = directory / CONFIG_FILE, aside / CONFIG_FILE
    # While weights are renamed there is no configuration that they could be read under.
    if old.exists() and old.read_bytes() != new.read_bytes():
        old.unlink()
        sync(directory)
    for name in (WEIGHTS_FILE, CARD_FILE, CONFIG_FILE):
        os.replace(aside / name, directory / name)
        sync(directory)
    for name in _STALE_FILES:
        (directory / name).unlink(missing_ok=True)
