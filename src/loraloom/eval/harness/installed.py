"""Whether lm-eval is there, which is an extra of its own."""

from __future__ import annotations

from loraloom.errors import ConfigError


def check_installed() -> None:
    """Raise a ConfigError if lm-eval can't be imported."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "tasks of lm-evaluation-harness need a package that is not installed; "
            "run: pip install 'loraloom[eval]'"
        ) from error
