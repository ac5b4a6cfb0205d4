"""Scores that are kept, so that an evaluation goes on where it was interrupted, and how it was got.

One SQLite file has the scores of all base models and adapters. Every batch is a transaction of its
own: several processes can share the file, and a crash leaves what was kept before.
"""

import hashlib
import json
import math
import platform
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loraloom.adapters.contract import Adapter
from loraloom.data.sources import sha256
from loraloom.devices import device_name
from loraloom.errors import ConfigError, plain
from loraloom.formats.raw_files import ADAPTER_FILES, find_adapter
from loraloom.host.host import Host

# Raise it with every change of the code that may change a log-likelihood or an answer.
SCORING_VERSION = 2

FILE_NAME = "log_likelihoods.sqlite3"

_LOCK_TIMEOUT_S = 60

_SCHEMA = """CREATE TABLE IF NOT EXISTS kept (
    id TEXT PRIMARY KEY, log_likelihoods TEXT
) WITHOUT ROWID"""

# What a score or an answer depends on: a question's choices, or a prompt and how it is answered.
Tokens = Sequence[Any]


class ScoreCache:
    """Scores of adapters on one base model (None), whose own weights must not change."""

    def __init__(self, directory: Path, host: Host):
        self.directory = directory
        self._host = host
        self._key = computation_key(host)
        self.begin()
        with self._open():
            pass

    def begin(self) -> None:
        """Begin an evaluation: count anew, and look at adapters' weights again."""
        self.num_found = 0
        self._ids: dict[str | None, str] = {}

    def find(self, keys: Sequence[tuple[str | None, Tokens]]) -> list[Any]:
        select = "SELECT log_likelihoods FROM kept WHERE id = ?"
        scores: list[tuple[Any, ...] | None] = []
        with self._open() as file:
            for adapter, tokens in keys:
                row = file.execute(select, (self._id(adapter, tokens),)).fetchone()
                scores.append(tuple(json.loads(row[0])) if row else None)
        self.num_found += len(scores) - scores.count(None)
        return scores

    def add(self, scores: Sequence[tuple[str | None, Tokens, Sequence[Any]]]) -> None:
        """Keep scores, or answers; those that are not finite are left out."""
        rows = []
        for adapter, tokens, values in scores:
            if all(isinstance(value, str) or math.isfinite(value) for value in values):
                rows.append((self._id(adapter, tokens), json.dumps(values)))
        with self._open() as file:
            # another process may have kept the same scores since
            file.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?)", rows)

    def _id(self, adapter: str | None, tokens: Tokens) -> str:
        if adapter not in self._ids:
            digest = None
            if adapter is not None:
                loaded = self._host.adapter(adapter)
                digest = adapter_digest(loaded)
                modules = [type(part.config).__module__ for part in loaded.parts]
                if not all(module.startswith("loraloom.") for module in modules):
                    digest = secrets.token_hex()  # another package's code may change any time
            self._ids[adapter] = json_digest({**self._key, "adapter": digest})
        return json_digest([self._ids[adapter], tokens])

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """Open the file, which is made when missing, for one transaction."""
        path = self.directory / FILE_NAME
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            # entered twice: to close it, and to commit or roll back
            with closing(sqlite3.connect(path, timeout=_LOCK_TIMEOUT_S)) as connection, connection:
                connection.execute(_SCHEMA)
                yield connection
        except (OSError, sqlite3.Error, ValueError) as error:
            raise ConfigError(
                f"scores cannot be cached in {path}: {error}; delete a damaged file, set "
                "XDG_CACHE_HOME, or pass --no-cache"
            ) from error


def describe_evaluation(host: Host, adapters: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Say how scores were computed; adapters as `describe_adapters` found them before scoring."""
    device = device_name(host.device)
    packages = {name: version(name) for name in ("loraloom", "torch", "transformers")}
    return {
        "base_model": plain(host.base.name_or_path),  # names of files may be no UTF-8
        "quantization": host.base.quantization,
        **_how_computed(host),
        "adapters": adapters,
        "versions": {"python": platform.python_version(), **packages},
        "device": f"{host.device} ({device})" if device else f"{host.device}",
        "platform": platform.platform(),
        "command": plain(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _how_computed(host: Host) -> dict[str, Any]:
    return {
        "scoring_version": SCORING_VERSION,
        "base_fingerprint": host.base.fingerprint,
        "dtype": str(host.dtype).removeprefix("torch."),
        "attention": host.config._attn_implementation,
    }


def describe_adapters(adapters: Mapping[str, str]) -> dict[str, Any]:
    described = {}
    for name, path in adapters.items():
        directory = find_adapter(path)
        files = [directory / file for file in ADAPTER_FILES]
        hashes = {file.name: sha256(file) for file in files if file.is_file()}
        described[name] = {"path": path, "sha256": hashes}
    return described


def computation_key(host: Host) -> dict[str, Any]:
    """Name all that a score depends on but adapter and tokens; batching only moves rounding."""
    # with its path, as copies in another dtype have the same fingerprint
    config = host.config.to_dict()
    config.pop("transformers_version", None)  # of what saved it
    return {
        **_how_computed(host),
        "quantization": host.base.quantization,
        "merged": host.merged and adapter_digest(host.adapter(host.merged)),
        "base_config": json_digest(config),
        "device": host.device.type,
        **{package: version(package) for package in ("torch", "transformers")},
    }


def adapter_digest(adapter: Adapter) -> str:
    """Hash an adapter's settings and weights as they are now, with SHA-256."""
    digest = hashlib.sha256()
    for member in adapter.parts:
        digest.update(member.config.model_dump_json().encode())
    # by name, as the order in which parameters were made is no part of what they compute
    for name, tensor in sorted(adapter.tensors().items()):
        values = tensor.detach().cpu().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
