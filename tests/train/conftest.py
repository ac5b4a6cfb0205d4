from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count calls of fsync in place of waiting for a disk that others write to as well."""
    calls: list[int] = []
    monkeypatch.setattr(os, "fsync", calls.append)
    return calls
