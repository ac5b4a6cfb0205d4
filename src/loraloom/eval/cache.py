"""Scores that are kept, so that an evaluation goes on where it was interrupted.

A file holds the scores of one adapter, or of the base model, under one way to compute them
(identity.py). It is only ever appended to, a line for each question:

    {"question": "<hash of its tokens>", "log_likelihoods": [-3.2, -5.1], "check": "<hash>"}

A line that was cut short by a crash fails its check and is passed over. Each append is one write
that begins on a new line, so that several processes can share a file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from loraloom.data.tokenising import TokenPair
from loraloom.durable import sync
from loraloom.errors import ConfigError
from loraloom.eval.identity import adapter_digest, computation_key
from loraloom.models.host import Host

LogLikelihoods = tuple[float, ...]
"""Of a question's choices."""

Tokens = Sequence[TokenPair]
"""Of a question's choices: what the model reads, and what is scored."""


def default_cache_directory() -> Path:
    """Give `$XDG_CACHE_HOME/loraloom/eval`, which is under `~/.cache` where that is not set."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "loraloom" / "eval"


class ScoreFile:
    """The scores of one adapter.

    Args:
        path: The file; its directory is there.
        key: What the scores depend on, for the file's first line.

    Raises:
        ConfigError: If it can't be read or written.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]):
        self._path = path
        try:
            _create(path, key)
            self._scores = dict(_read(path))
        except OSError as error:
            raise _cache_error(path, error) from error

    def find(self, question: Tokens) -> LogLikelihoods | None:
        """Give a question's log-likelihoods if they are known."""
        return self._scores.get(question_digest(question))

    def add(self, scores: Sequence[tuple[Tokens, LogLikelihoods]]) -> None:
        """Keep scores; those that are not finite are left out.

        Raises:
            ConfigError: If the system can't write them.
        """
        finite = {
            question_digest(question): values
            for question, values in scores
            if all(map(math.isfinite, values))
        }
        try:
            _append(self._path, finite.items())
        except OSError as error:
            raise _cache_error(self._path, error) from error
        self._scores.update(finite)

    def sync(self) -> None:
        """Flush to the disk what was added, unless somebody has deleted it."""
        with suppress(FileNotFoundError):
            sync(self._path)


class ScoreCache:
    """The scores of several adapters on one base model; None is the base model itself.

    Weights must not change while it is used.

    Args:
        directory: Made when missing.
        host: With the adapters.
        adapters: Names.

    Raises:
        ConfigError: If the directory can't be used.
    """

    def __init__(self, directory: Path, host: Host, adapters: Sequence[str | None]):
        self.directory = directory
        self.num_found = 0
        self.num_added = 0
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cache_error(directory, error) from error
        computation = computation_key(host)
        self._files = {name: self._open(host, name, computation) for name in adapters}

    def _open(self, host: Host, name: str | None, computation: Mapping[str, Any]) -> ScoreFile:
        digest = None if name is None else adapter_digest(host.adapter(name))
        key = {**computation, "adapter": digest}
        return ScoreFile(self.directory / f"{_digest(key)}.jsonl", key)

    def find(self, adapter: str | None, question: Tokens) -> LogLikelihoods | None:
        """Give a question's log-likelihoods if they are known."""
        found = self._files[adapter].find(question)
        self.num_found += found is not None
        return found

    def add(self, adapter: str | None, scores: Sequence[tuple[Tokens, LogLikelihoods]]) -> None:
        """Keep scores; see `ScoreFile.add`."""
        self._files[adapter].add(scores)
        self.num_added += len(scores)

    def sync(self) -> None:
        """Flush to the disk what was added."""
        for file in self._files.values():
            file.sync()


def question_digest(question: Tokens) -> str:
    """Hash the tokens of each choice."""
    return _digest([[pair.context, pair.continuation] for pair in question])


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _create(path: Path, key: Mapping[str, Any]) -> None:
    """Begin a file with what its scores depend on, for whoever looks into it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "wb") as file:
        file.write(json.dumps({"key": dict(key)}).encode() + b"\n")


def _read(path: Path) -> Iterable[tuple[str, LogLikelihoods]]:
    for line in path.read_bytes().split(b"\n"):
        record = _parse(line)
        if record is not None:
            yield record["question"], tuple(record["log_likelihoods"])


def _parse(line: bytes) -> dict[str, Any] | None:
    """Read a line's record; None for another line or a damaged one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or "check" not in record:
        return None
    return record if record.pop("check") == _digest(record) else None


def _append(path: Path, scores: Iterable[tuple[str, LogLikelihoods]]) -> None:
    lines = [_line(question, values) for question, values in scores]
    if not lines:
        return
    block = ("\n" + "".join(lines)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)  # it may be deleted at any time
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(descriptor, block) < len(block):
            raise OSError("the disk is full")
    finally:
        os.close(descriptor)


def _line(question: str, values: LogLikelihoods) -> str:
    record = {"question": question, "log_likelihoods": list(values)}
    return json.dumps({**record, "check": _digest(record)}) + "\n"


def _cache_error(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"scores can't be kept in {path}: {error.strerror or error}; give another --cache DIR, "
        "or --no-cache"
    )
