from __future__ import annotations

import sys

import pytest

from loraloom.errors import ConfigError
from loraloom.eval.harness.installed import check_installed


def test_a_missing_lm_eval_says_what_to_install(monkeypatch):
    check_installed()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"run: pip install 'loraloom\[eval\]'"):
        check_installed()
