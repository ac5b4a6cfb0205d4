"""Scores that are kept, so that an evaluation goes on where it was interrupted.

One SQLite file holds the scores of all base models and adapters. A score is known by its
computation, a hash of all that it depends on (`computation_key`), and by a hash of its question's
tokens. Every batch is a transaction of its own: several processes can share a file, and a crash
leaves what was kept before. A connection is open only while something is read or written, so that
the file can be deleted at any time.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

from loraloom.data.tokens import TokenPair
from loraloom.durable import cache_directory
from loraloom.errors import ConfigError
from loraloom.eval.provenance import adapter_digest, computation_key, json_digest
from loraloom.models.host import Host

FILE_NAME = "scores.sqlite3"

_LOCK_TIMEOUT_S = 60

_SCHEMA = """
PRAGMA journal_mode = DELETE; -- WAL needs memory that all processes share, so one machine
CREATE TABLE IF NOT EXISTS computations (id TEXT PRIMARY KEY, description TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (
    computation TEXT, question TEXT, log_likelihoods TEXT, PRIMARY KEY (computation, question)
) WITHOUT ROWID;
"""

LogLikelihoods = tuple[float, ...]
"""Of a question's choices."""

Result = TypeVar("Result")

Tokens = Sequence[TokenPair]
"""Of a question's choices: what the model reads, and what is scored."""


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
        keys = {
            name: {**key, "adapter": name and adapter_digest(host.adapter(name))}
            for name in adapters
        }
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
    connection: sqlite3.Connection, computations: Mapping[str, Any]
) -> dict[tuple[str, str], LogLikelihoods]:
    """Note what is going to be computed, and read what is known of it."""
    ((state,),) = connection.execute("PRAGMA quick_check(1)")
    if state != "ok":
        raise sqlite3.DatabaseError(state)
    notes = [(name, json.dumps(description)) for name, description in computations.items()]
    connection.executemany("INSERT OR IGNORE INTO computations VALUES (?, ?)", notes)
    wanted = ", ".join("?" * len(computations))
    rows = connection.execute(
        f"SELECT * FROM scores WHERE computation IN ({wanted})", list(computations)
    )
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
