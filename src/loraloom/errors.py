"""What can go wrong, as one tree.

    LoraloomError           what a user can act on; the command line prints it, exits with 2
    ├── ConfigError         a run file, an option or a configuration of an adapter is wrong
    ├── DataError           a data set is missing, empty or has a row that can't be used
    ├── ModelError          a base model can't be loaded or attached to
    ├── AdapterError        an adapter is unknown, its name taken, or it does not fit the base
    ├── FormatError         files of an adapter can't be read
    └── TrainingError       a job can't go on (a loss that is not finite, say)

A message says what was expected, what came and what to do.
"""

from __future__ import annotations


class LoraloomError(Exception):
    """Root of every error that loraloom raises on purpose."""


class ConfigError(LoraloomError, ValueError):
    """A run file, an option or an adapter's configuration is wrong."""


class DataError(LoraloomError, ValueError):
    """A data set is missing, empty or has a row that can't be used."""


class ModelError(LoraloomError):
    """A base model can't be loaded or attached to."""


class AdapterError(LoraloomError):
    """An adapter is unknown, its name is taken, or it doesn't fit the base model."""


class FormatError(LoraloomError):
    """Files of an adapter can't be read."""


class TrainingError(LoraloomError):
    """A job can't go on."""
