"""An adapter's raw files: read, and written so that a crash leaves the old ones or the new."""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor

from loraloom.atomic_io import is_being_written, remove_leftovers, staging, sync, write_directory
from loraloom.config.text import local_path, parse_yaml, read_json, read_text
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
# Between tries to read files that a process is replacing.
_WAITS_S = (0.05, 0.1, 0.2)
# By their names in safetensors files.
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# The metadata that loraloom writes: a record in JSON.
RECORD = "loraloom"

HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
# The first is that of the HTTP client, which huggingface_hub has changed: no connection, say.
_HUB_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], HFValidationError, OSError)  # ty: ignore[invalid-assignment]


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
    settings: dict[str, Any]  # of the run; empty where no file has them


@dataclass(frozen=True)
class AdapterFiles:
    """The files of an adapter, before anything in them is understood."""

    config: dict[str, Any]  # fields of adapter_config.json; null is as good as no field
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=lambda: {"format": "pt"})
    """The header of the safetensors file."""
    source: str = "the adapter"  # where they came from, for messages
    sidecar: Sidecar | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the method that the user gives: what files lack, or in place of theirs."""

    def error(self, message: str) -> FormatError:
        return FormatError(f"{self.source}: {message}")

    def renamed(self, names: Mapping[str, str]) -> dict[str, Tensor]:
        """Rename tensors and leave out others; a FormatError if two have one meaning."""
        renamed = {old: names[old] for old in self.tensors if old in names}
        twice = [new for new, count in Counter(renamed.values()).items() if count > 1]
        if twice:
            same = [old for old, new in renamed.items() if new == twice[0]]
            raise self.error(f"only one tensor may be {twice[0]}, got {names_in(same)}")
        return {new: self.tensors[old] for old, new in renamed.items()}

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
    """Read adapter_config.json and the weights, from safetensors or else from a pickle.

    Files that another process is replacing are read again, until they belong together.
    """
    for wait_s in _WAITS_S:
        with suppress(FormatError):
            return _read_once(directory)
        if not is_being_written(directory):
            break
        time.sleep(wait_s)
    return _read_once(directory)


def _read_once(directory: Path) -> AdapterFiles:
    path = directory / CONFIG_FILE
    if not path.is_file():
        is_model = (directory / "config.json").is_file()
        hint = "a base model, not an adapter" if is_model else "not an adapter, or incomplete"
        raise FormatError(f"{directory} has no {CONFIG_FILE} ({hint}); name an adapter's directory")
    fields = read_json(path, FormatError)
    if not isinstance(fields, dict):
        raise FormatError(f"{path} must contain a JSON object, got {type(fields).__name__}")
    weights = directory / WEIGHTS_FILE
    pickled = directory / PICKLE_FILE
    metadata = {}
    if weights.is_file():
        tensors, metadata = _read_safetensors(weights)
    elif pickled.is_file():
        tensors = _read_pickle(pickled)
    else:
        raise FormatError(f"{directory} contains neither {WEIGHTS_FILE} nor {PICKLE_FILE}")
    # A writer takes an old configuration away before it puts other weights in place.
    if read_json(path, FormatError) != fields:
        raise FormatError(f"{directory} is being replaced; load it again")
    # PEFT writes null for what is unset.
    config = {name: value for name, value in fields.items() if value is not None}
    # What lies beside weights of loraloom's is left of another adapter.
    sidecar = None if RECORD in metadata else _read_sidecar(directory)
    return AdapterFiles(config, tensors, metadata, str(directory), sidecar)


def _read_sidecar(directory: Path) -> Sidecar | None:
    """Read what axolotl has beside the weights; its settings may be above a checkpoint of a run."""
    if not (directory / SIDECAR_WEIGHTS).is_file():
        return None
    candidates = [directory / name for name in SIDECAR_SETTINGS]
    if directory.name.startswith("checkpoint-"):
        candidates += [directory.parent / name for name in SIDECAR_SETTINGS]
    tensors, _ = _read_safetensors(directory / SIDECAR_WEIGHTS)
    for path in candidates:
        if path.is_file():
            settings = parse_yaml(read_text(path, FormatError), str(path), FormatError)
            return Sidecar(tensors, settings if isinstance(settings, dict) else {})
    return Sidecar(tensors, {})


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        # At once, because another process may replace the file.
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _plain_tensors(path, tensors), metadata
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
    unsupported = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype not in _DTYPES
        or tensor.layout != torch.strided
        or tensor.is_meta
        or tensor.nbytes > tensor.untyped_storage().nbytes()
    ]
    if unsupported:
        raise FormatError(
            f"{path}: tensors must be floating point (float64, float32, float16 or bfloat16), "
            f"dense and stored in full, got others in {names_in(unsupported)}"
        )
    return tensors


def refuse_to_overwrite(directory: Path) -> None:
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
    except OSError as error:
        raise AdapterError(f"the adapter can't be written to {directory}: {error}") from error


def write_new(directory: Path, files: AdapterFiles, card: str, *, pickled: bool = False) -> None:
    """Write an adapter to a directory that isn't there yet; it appears whole."""
    if directory.exists():
        raise AdapterError(f"{directory} already exists; convert to a new directory")
    try:
        write_directory(directory, lambda aside: _fill(aside, files, card, pickled))
    except OSError as error:
        raise AdapterError(f"the adapter can't be written to {directory}: {error}") from error


def _fill(aside: Path, files: AdapterFiles, card: str, pickled: bool = False) -> None:
    config = json.dumps(files.config, indent=2, ensure_ascii=False, allow_nan=False)
    (aside / CONFIG_FILE).write_text(config + "\n", "utf-8", "replace")
    (aside / CARD_FILE).write_text(card, "utf-8", "replace")
    if pickled:
        # Copied, so that experts that are views of one tensor don't share storage.
        tensors = {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in files.tensors.items()
        }
        torch.save(tensors, aside / PICKLE_FILE)
    else:
        # Readers expect larger dtypes first, which keeps each tensor aligned.
        names = sorted(files.tensors, key=lambda name: (-files.tensors[name].itemsize, name))
        tensors = {name: files.tensors[name] for name in names}
        write_safetensors(aside / WEIGHTS_FILE, tensors, tensors.values(), files.metadata)


def write_safetensors(
    path: Path,
    described: Mapping[str, Tensor],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a file of tensors, which may be made one by one: their shapes and dtypes come first.

    Equal tensors make equal files. The library's own writer has metadata in an order of chance.

    Source: safetensors 0.8, README (Format).
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    stop = 0
    for name, tensor in described.items():
        start = stop
        stop = start + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": [*tensor.shape],
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for planned, tensor in zip(described.values(), tensors, strict=True):
            assert planned.shape == tensor.shape
            assert planned.dtype == tensor.dtype
            values = tensor.detach().cpu().contiguous()
            file.write(values.flatten().view(torch.uint8).numpy().data)


def _publish(aside: Path, directory: Path) -> None:
    old = directory / CONFIG_FILE
    new = aside / CONFIG_FILE
    stale = [directory / name for name in _STALE_FILES if (directory / name).exists()]
    # While weights are renamed there is no configuration that another program could read them by.
    if old.exists() and (stale or old.read_bytes() != new.read_bytes()):
        old.unlink()
        sync(directory)
    for path in stale:
        path.unlink(missing_ok=True)
    for name in (WEIGHTS_FILE, CARD_FILE, CONFIG_FILE):
        os.replace(aside / name, directory / name)
        sync(directory)
