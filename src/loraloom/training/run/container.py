"""How much memory a container leaves: Linux's control groups, version 1 and 2.

A group's limit holds for all groups below it, so every group from this process's own up to the
root is looked at. What a group uses includes files that the system keeps in memory; those that
nobody has used lately are given up before a process is killed, and don't count.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_Names = tuple[str, str, str]
"""What a version calls a group's limit and usage, and in its statistics the inactive files."""

_V2: _Names = ("memory.max", "memory.current", "inactive_file")
_V1: _Names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def container_bytes_left(
    groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")
) -> int | None:
    """Return the bytes that this process's control groups let it take; None without a limit."""
    left = [_bytes_left(group, names) for group, names in _own_groups(groups, own)]
    return min((count for count in left if count is not None), default=None)


def _own_groups(groups: Path, own: Path) -> Iterator[tuple[Path, _Names]]:
    """Give the group of each version and all above it; in a container a part may not be seen."""
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            mount, names = groups / "memory", _V1
        elif controllers == "":
            mount, names = groups, _V2
        else:
            continue
        place = Path(path.lstrip("/"))
        for part in (place, *place.parents):
            yield mount / part, names


def _bytes_left(group: Path, names: _Names) -> int | None:
    limit, usage = (_read(group / name).strip() for name in names[:2])
    if not (limit.isdecimal() and usage.isdecimal()):  # `max`, or no such file
        return None
    lines = (line.split() for line in _read(group / "memory.stat").splitlines())
    inactive = next((int(line[1]) for line in lines if line[0] == names[2]), 0)
    return max(0, int(limit) - int(usage) + inactive)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""
