"""What other packages bring, by entry points: methods, objectives and trackers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any


def take_entries(group: str, take: Callable[[Any, str], object]) -> None:
    """Load what packages name in a group of entry points, each with the name of its package."""
    for entry in entry_points(group=group):
        # A package that is imported first, and imports loraloom, registers by itself.
        module = sys.modules.get(entry.module)
        if getattr(getattr(module, "__spec__", None), "_initializing", False):
            continue
        package = entry.dist.name if entry.dist else ""
        try:
            take(entry.load(), package)
        except Exception as error:
            raise ImportError(
                f"{entry.value} of {group} in the package {package} can't be loaded: {error}; mend "
                "or uninstall it"
            ) from error
