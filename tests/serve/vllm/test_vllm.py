"""vLLM itself with the plug-in, where there is a Python that has both."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

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
