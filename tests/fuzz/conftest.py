from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _nothing_loses_its_power(monkeypatch):
    """Leave out the waiting for the disk: thousands of files are written and forgotten."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
