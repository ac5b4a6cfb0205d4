"""Peak resident memory of training steps, each case in a process of its own (Linux).

Run as `python -m loraloom.bench.memory CASE SETTING_JSON`, it prints the peak in bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict

from loraloom.bench.step import StepSetting, make_step
from loraloom.bench.timing import peak_rss_bytes, reset_peak_rss

_STEPS = 3


def step_peak_rss_bytes(case: str, setting: StepSetting) -> int:
    """Measure a case's steps: the high-water mark, reset after loading."""
    command = [sys.executable, "-m", "loraloom.bench.memory", case, json.dumps(asdict(setting))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def main(case: str, setting: str) -> None:
    """Run some steps and print the peak."""
    step = make_step(case, StepSetting(**json.loads(setting)))
    reset_peak_rss()
    for _ in range(_STEPS):
        step()
    print(peak_rss_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
