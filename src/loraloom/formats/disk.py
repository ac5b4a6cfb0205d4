"""Reading an adapter's files, and writing them so that a crash leaves the old ones or the new."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from loraloom.adapters.files import (
    CONFIG_FILE,
    AdapterFields,
    AdapterFiles,
    SidecarFiles,
    checked_fields,
)
from loraloom.config.text import parse_yaml, read_json
from loraloom.durable import remove_leftovers, staging, sync, write_directory
from loraloom.errors import AdapterError, ConfigError, FormatError
from loraloom.formats.contents import (
    CARD_FILE,
    PICKLE_FILE,
    SIDECAR_SETTINGS,
    SIDECAR_WEIGHTS,
    WEIGHTS_FILE,
    names_in,
)

_ABANDONED_S = 3600.0
"""Age at which files that lie aside are no longer being written by anybody."""

_STALE_FILES = (PICKLE_FILE, SIDECAR_WEIGHTS)
"""What would be read instead of new files, or beside them."""
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, *_STALE_FILES, CARD_FILE)
_READ_WEIGHTS = {WEIGHTS_FILE, *_STALE_FILES}
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt"}
_NO_PART = re.compile(
    r"(optimizer|scheduler|sampler|scaler|training_args|rng_state|random_states|dl_state_dict)\w*\.\w+"
    r"|(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)"
)
"""What trainers keep beside an adapter: states, and whole models under transformers' names."""
_MAX_CONFIG_BYTES = 2**24
_STORED_DTYPES = {"F64", "F32", "F16", "BF16"}
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FLOATING = "floating point (float64, float32, float16 or bfloat16)"
_PLAIN: dict[str, Callable[[Tensor], bool]] = {
    _FLOATING: lambda tensor: tensor.dtype in _DTYPES,
    "dense": lambda tensor: tensor.layout == torch.strided,
    "in the file": lambda tensor: tensor.device.type == "cpu",
    "stored in full": lambda tensor: tensor.nbytes <= tensor.untyped_storage().nbytes(),
}
"""What tensors of a pickle must be; each is asked of those that are what comes before."""


def read_files(directory: Path) -> AdapterFiles:
    """Read adapter_config.json and the weights, from safetensors or else from a pickle."""
    if not directory.is_dir():
        raise FormatError(f"an adapter must be a directory, got the file {directory}")
    config = _read_config(directory)
    check_all_read(str(directory), (path.name for path in directory.iterdir() if path.is_file()))
    weights, pickled = directory / WEIGHTS_FILE, directory / PICKLE_FILE
    if weights.is_file():
        tensors, metadata = _read_safetensors(weights)
    elif pickled.is_file():
        tensors, metadata = _read_pickle(pickled), {}
    else:
        raise FormatError(f"{directory} must have {WEIGHTS_FILE} or {PICKLE_FILE}, it has neither")
    return AdapterFiles(
        config, tensors, metadata, source=str(directory), sidecar=_read_sidecar(directory)
    )


def check_all_read(source: str, names: Iterable[str]) -> None:
    """Raise a FormatError for files beside an adapter's that look like weights and aren't read."""
    unread = [
        name
        for name in sorted(names)
        if Path(name).suffix in _WEIGHT_SUFFIXES
        and name not in _READ_WEIGHTS
        and not _NO_PART.fullmatch(name)
    ]
    if unread:
        raise FormatError(
            f"{source} has weights that loraloom doesn't read ({names_in(unread)}), without which "
            "the adapter may be another one; move them elsewhere if they aren't a part of it"
        )


def _read_sidecar(directory: Path) -> SidecarFiles | None:
    """Read what axolotl has beside the weights; its settings may be above a checkpoint of a run."""
    if not (directory / SIDECAR_WEIGHTS).is_file():
        return None
    places = [directory, *([directory.parent] if directory.name.startswith("checkpoint-") else [])]
    files = (place / name for place in places for name in SIDECAR_SETTINGS)
    settings = next((_read_yaml(path) for path in files if path.is_file()), {})
    return SidecarFiles(_read_safetensors(directory / SIDECAR_WEIGHTS)[0], settings)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        settings = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (ConfigError, OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} can't be read: {error}") from error
    return settings if isinstance(settings, dict) else {}


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_FILE
    if not path.is_file():
        is_model = (directory / "config.json").is_file()
        hint = "it is a model, not an adapter" if is_model else "it is no adapter, or one cut short"
        raise FormatError(f"{directory} must have {CONFIG_FILE}, it has none; {hint}")
    config = read_json(path, FormatError, _MAX_CONFIG_BYTES)
    if not isinstance(config, dict):
        raise FormatError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return checked_fields(AdapterFields, config, str(path)).model_dump(exclude_unset=True)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            names = list(file.keys())  # `file` itself can't be iterated
            odd = [name for name in names if file.get_slice(name).get_dtype() not in _STORED_DTYPES]
            if odd:
                raise _odd_tensors(path, _FLOATING, odd)
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise FormatError(f"{path} can't be read as safetensors: {error}; get it again") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Read a flat dict of tensors; anything that would run code is refused."""
    try:
        _check_not_compressed(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is broken in a pickle decides which error it is
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path} can't be read as a dict of tensors: {reason}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise FormatError(f"{path} must hold a flat dict of tensors by name")
    _check_plain(path, tensors)
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def _check_not_compressed(path: Path) -> None:
    """Raise a ValueError for an archive that becomes larger in memory; torch writes none."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is a compressed archive")


def _check_plain(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise a FormatError for tensors that are not numbers in memory, each in a place of its own.

    A pickle may hold a sparse tensor, one without data, and one whose numbers are all the same
    place in memory and that becomes as large as it says only when it is copied.
    """
    for wanted, is_so in _PLAIN.items():
        odd = [name for name, tensor in tensors.items() if not is_so(tensor)]
        if odd:
            raise _odd_tensors(path, wanted, odd)


def _odd_tensors(path: Path, wanted: str, odd: list[str]) -> FormatError:
    return FormatError(f"{path}: tensors must be {wanted}: {names_in(odd)} are not")


def refuse_to_overwrite(directory: Path) -> None:
    """Raise an AdapterError if a directory has an adapter's files already."""
    if directory.exists() and not directory.is_dir():
        raise AdapterError(f"an adapter is saved to a directory, {directory} is a file")
    present = [name for name in ADAPTER_FILES if (directory / name).exists()]
    if present:
        raise AdapterError(
            f"{directory} already has {names_in(present)}; save elsewhere, or ask to overwrite"
        )


def replace_files(directory: Path, files: AdapterFiles, card: str) -> None:
    """Put an adapter's three files into a directory that may hold others.

    They are written aside, synced to the disk and renamed, adapter_config.json last. If the
    process dies, the directory holds the old adapter, the new one, or no adapter_config.json
    (never the new weights under another old configuration).
    """
    is_new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory, older_than_s=_ABANDONED_S)
        with staging(directory) as aside:
            _stage(aside, files, card)
            _publish(aside, directory)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"the adapter can't be written to {directory}: {error}") from error
    finally:
        if is_new:
            with suppress(OSError):  # it isn't empty, or isn't there
                directory.rmdir()


def write_new(
    directory: Path,
    files: AdapterFiles,
    card: str,
    *,
    pickled: bool = False,
    sidecar: SidecarFiles | None = None,
) -> None:
    """Write an adapter to a directory that isn't there yet; it appears whole."""
    if directory.exists():
        raise AdapterError(f"{directory} is there already; convert to a new directory")

    def fill(aside: Path) -> None:
        _write_config(aside, files, card)
        if pickled:
            torch.save(_copies(files.tensors), aside / PICKLE_FILE)
        else:
            _write_tensors(aside / WEIGHTS_FILE, files.tensors, files.metadata)
        if sidecar is not None:
            _write_tensors(aside / SIDECAR_WEIGHTS, sidecar.tensors, {"format": "pt"})
            text = yaml.safe_dump(sidecar.settings)
            (aside / SIDECAR_SETTINGS[0]).write_text(text, encoding="utf-8")

    try:
        write_directory(directory, fill)
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"the adapter can't be written to {directory}: {error}") from error


def _stage(aside: Path, files: AdapterFiles, card: str) -> None:
    _write_config(aside, files, card)
    _write_tensors(aside / WEIGHTS_FILE, files.tensors, files.metadata)
    for name in (WEIGHTS_FILE, CONFIG_FILE, CARD_FILE):
        sync(aside / name)


def _write_config(aside: Path, files: AdapterFiles, card: str) -> None:
    config = json.dumps(files.config, indent=2, ensure_ascii=False, allow_nan=False)
    (aside / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
    (aside / CARD_FILE).write_text(card, encoding="utf-8")


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    save_file(_copies(tensors), path, metadata=metadata)
    shutil.copymode(path.parent / CONFIG_FILE, path)  # safetensors makes it 0600


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy to the CPU, so that experts that are views of one tensor don't share storage."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()
    }


def _publish(aside: Path, directory: Path) -> None:
    old, new = directory / CONFIG_FILE, aside / CONFIG_FILE
    if old.exists() and old.read_bytes() != new.read_bytes():
        old.unlink()
        sync(directory)
    for name in (WEIGHTS_FILE, CARD_FILE, CONFIG_FILE):
        os.replace(aside / name, directory / name)
        sync(directory)
    for name in _STALE_FILES:
        (directory / name).unlink(missing_ok=True)
