"""The plug-in in vLLM itself, where a Python has both."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from loraloom.errors import ConfigError
from loraloom.serve import vllm
from loraloom.serve.vllm.folding import max_top_k


def test_a_version_that_is_not_known_leaves_vllm_as_it_is(monkeypatch, caplog):
    monkeypatch.setattr(vllm, "vllm_version", lambda: "0.99.0")
    vllm.register()
    assert "supports vLLM 0.32 or 0.33, got 0.99.0; vLLM serves no mixtures" in caplog.text


def test_the_largest_top_k_is_a_whole_number(monkeypatch):
    monkeypatch.setenv("LORALOOM_MAX_TOP_K", "two")
    with pytest.raises(ConfigError, match="LORALOOM_MAX_TOP_K must be a whole number of 1 or more"):
        max_top_k()


PYTHON = os.environ.get("LORALOOM_VLLM_PYTHON", "")
ROOT = Path(__file__).parents[3]


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="LORALOOM_VLLM_PYTHON names no Python with vLLM")
def test_mixtures_loras_and_the_base_say_in_one_batch_what_they_say_here():
    ran = subprocess.run(
        [PYTHON, "-m", "benchmarks.vllm_plugin", "check", "--families", "llama"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert json.loads(ran.stdout.splitlines()[-1])["equal"]
