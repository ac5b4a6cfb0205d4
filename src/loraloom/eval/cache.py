"""Scores that are kept, so that an evaluation goes on where it was interrupted, and how it was got.

One SQLite file holds the scores of all base models and adapters. A score is known by its
computation, a hash of all that it depends on (`computation_key`), and by a hash of its question's
tokens. Every batch is a transaction of its own: several processes can share a file, and a crash
leaves what was kept before. A connection is open only while something is read or written, so that
the file can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch

from loraloom.adapters.method import Adapter
from loraloom.data.sources import sha256
from loraloom.data.tokens import TokenPair
from loraloom.durable import cache_directory
from loraloom.errors import ConfigError
from loraloom.formats.disk import ADAPTER_FILES
from loraloom.formats.hub import find_adapter
from loraloom.models.host import Host
from loraloom.models.quantization import stored_weights

# Raise it with every change of the code that may change a log-likelihood.
SCORING_VERSION = 1

FILE_NAME = "scores.sqlite3"

_LOCK_TIMEOUT_S = 60
# By the bytes of a number.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_SCHEMA = """
PRAGMA journal_mode = DELETE; -- WAL needs memory that all processes share, so one machine
CREATE TABLE IF NOT EXISTS computations (id TEXT PRIMARY KEY, description TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (
    computation TEXT, question TEXT, log_likelihoods TEXT, PRIMARY KEY (computation, question)
) WITHOUT ROWID;
"""

# Of a question's choices.
LogLikelihoods = tuple[float, ...]

Result = TypeVar("Result")

# Of a question's choices: what the model reads, and what is scored.
Tokens = Sequence[TokenPair]


def default_cache_directory() -> Path:
    """Give the directory of scores in the user's cache."""
    return cache_directory() / "eval"


class ScoreCache:
    """The scores of several adapters on one base model; None is the base model itself.

    `num_found` scores were known, `num_added` are kept in the file since then; `fault` is why some
    are not, if so. Weights must not change while it is used.
    """

    def __init__(self, directory: Path, host: Host, adapters: Sequence[str | None]):
        self.directory = directory
        self.num_found = self.num_added = 0
        self.fault: str | None = None
        self._path = directory / FILE_NAME
        key = computation_key(host)
        digests = {name: name and adapter_digest(host.adapter(name)) for name in adapters}
        keys = {name: {**key, "adapter": digest} for name, digest in digests.items()}
        self._ids = {name: json_digest(value) for name, value in keys.items()}
        computations = {self._ids[name]: value for name, value in keys.items()}
        self._scores = _transact(self._path, lambda file: _read_scores(file, computations))

    def find(self, adapter: str | None, question: Tokens) -> LogLikelihoods | None:
        """Give a question's log-likelihoods if they are known."""
        known = self._scores.get((self._ids[adapter], json_digest(question)))
        self.num_found += known is not None
        return known

    def add(self, scores: Sequence[tuple[str | None, Tokens, LogLikelihoods]]) -> None:
        """Keep scores of adapters and questions; those that are not finite are left out.

        Where the file can't be written any more, they are kept until the evaluation ends.
        """
        finite = {
            (self._ids[adapter], json_digest(question)): values
            for adapter, question, values in scores
            if all(map(math.isfinite, values))
        }
        rows = [(*key, json.dumps(values)) for key, values in finite.items()]
        # another process may have kept the same scores since this one began
        insert = "INSERT OR REPLACE INTO scores VALUES (?, ?, ?)"
        self._scores.update(finite)
        try:
            if rows:
                _transact(self._path, lambda file: file.executemany(insert, rows))
        except ConfigError as error:
            self.fault = str(error)
        else:
            self.num_added += len(finite)


def _read_scores(
    file: sqlite3.Connection, computations: Mapping[str, Any]
) -> dict[tuple[str, str], LogLikelihoods]:
    """Note what is going to be computed, and read what is known of it."""
    ((state,),) = file.execute("PRAGMA quick_check(1)")
    if state != "ok":
        raise sqlite3.DatabaseError(state)
    notes = [(name, json.dumps(description)) for name, description in computations.items()]
    file.executemany("INSERT OR IGNORE INTO computations VALUES (?, ?)", notes)
    wanted = f"computation IN ({', '.join('?' * len(computations))})"
    rows = file.execute(f"SELECT * FROM scores WHERE {wanted}", list(computations))
    return {(name, question): tuple(json.loads(values)) for name, question, values in rows}


def _transact(path: Path, work: Callable[[sqlite3.Connection], Result]) -> Result:
    """Do a transaction in a file, which is made when missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=_LOCK_TIMEOUT_S)) as connection:
            connection.executescript(_SCHEMA)
            with connection:
                return work(connection)
    except (OSError, sqlite3.Error, ValueError) as error:
        raise ConfigError(
            f"scores can't be kept in {path.parent}: {error}; delete {path.name} there if it is "
            "damaged, or give another --cache DIR, or --no-cache"
        ) from error


def describe_evaluation(host: Host, adapters: Mapping[str, str], command: str) -> dict[str, Any]:
    """Describe the base model, adapters, software and machine of an evaluation."""
    is_cuda = host.device.type == "cuda"
    device = f"{host.device} ({torch.cuda.get_device_name(host.device)})" if is_cuda else None
    return {
        "base_model": host.base.name_or_path,
        "quantization": host.base.quantization,
        **_how_computed(host),
        "adapters": describe_adapters(adapters),
        "versions": versions(),
        "device": device or str(host.device),
        "platform": platform.platform(),
        "command": command,
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
    """Describe adapters by name: where each is from, and the hashes of its files."""
    described = {}
    for name, path in adapters.items():
        files = [find_adapter(path) / file for file in ADAPTER_FILES]
        hashes = {file.name: sha256(file) for file in files if file.is_file()}
        described[name] = {"path": path, "sha256": hashes}
    return described


def versions() -> dict[str, str]:
    """Versions of what results may depend on."""
    packages = {name: version(name) for name in ("loraloom", "torch", "transformers")}
    return {"python": platform.python_version(), **packages}


def computation_key(host: Host) -> dict[str, Any]:
    """Name everything but the adapter and the tokens that a log-likelihood depends on.

    How rows are batched is left out: it moves sums by rounding alone.
    """
    # neither where the base was loaded from nor what saved it
    left_out = ("_name_or_path", "transformers_version")
    config = {k: value for k, value in host.config.to_dict().items() if k not in left_out}
    text = json.dumps(config, sort_keys=True, default=str)
    return {
        **_how_computed(host),
        "base_weights": _weights_digest(host),
        "base_config": hashlib.sha256(text.encode()).hexdigest()[:32],
        "device": host.device.type,
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def adapter_digest(adapter: Adapter) -> str:
    """Hash an adapter's settings and weights as they are now, with SHA-256."""
    digest = hashlib.sha256(adapter.config.model_dump_json().encode())
    # by name, as the order in which parameters were made is no part of what they compute
    for name, tensor in sorted(adapter.tensors().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _weights_digest(host: Host) -> str:
    """Hash sums of every base tensor's bits: each weight and its place count."""
    digest = hashlib.sha256()
    for name, weight in stored_weights(host.model):
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        bits = weight.detach().contiguous().view(_INTEGERS[weight.element_size()])
        matrix = bits.reshape(-1, bits.shape[-1] if bits.dim() else 1)
        for dim in (0, 1):  # by row and by column: two passes over the memory, little to hash
            digest.update(matrix.sum(dim, dtype=torch.int64).cpu().numpy().data)
    return digest.hexdigest()[:32]


def json_digest(value: Any) -> str:
    """Hash a value that JSON holds, such as a question's tokens."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
