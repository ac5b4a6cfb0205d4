"""Peak resident memory of training steps, each case in a process of its own (Linux).

Run as `python -m loraloom.bench.memory CASE SETTING_JSON`, it prints the peak in bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace

from loraloom.adapters.adapter import Adapter
from loraloom.bench.cases import StepSetting
from loraloom.bench.step import make_step
from loraloom.bench.timing import peak_rss_bytes, reset_peak_rss

_STEPS = 3


def step_peak_rss_bytes(case: str, setting: StepSetting) -> int:
    """Measure a case's steps: the high-water mark, reset after loading."""
    command = [sys.executable, "-m", "loraloom.bench.memory", case, json.dumps(asdict(setting))]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def describe_jobs_memory(case: str, setting: StepSetting, adapter: Adapter) -> str:
    """Measure the peaks of one job's steps and of `num_jobs`' fused ones, a process each."""
    weight_bytes = sum(p.numel() * p.element_size() for p in adapter.parameters())
    return describe_peaks(
        setting.num_jobs,
        step_peak_rss_bytes(case, replace(setting, num_jobs=1)),
        step_peak_rss_bytes(case, setting),
        state_bytes=4 * weight_bytes,  # weights, gradients, two of AdamW's
    )


def describe_peaks(num_jobs: int, one_bytes: int, all_bytes: int, state_bytes: int) -> str:
    """Set all jobs' peak against one job's, and what each adds against its AdamW training state."""
    share = all_bytes / (num_jobs * one_bytes)
    added = (all_bytes - one_bytes) / (num_jobs - 1) / state_bytes
    return (
        f"peak memory: 1 job {one_bytes / 1e9:.2f} GB, {num_jobs} jobs {all_bytes / 1e9:.2f} GB, "
        f"{share:.2f} of {num_jobs} times one; each further job adds {added:.2f} times its "
        f"weights, gradients and AdamW state ({state_bytes / 1e9:.3f} GB)"
    )


def main(case: str, setting: str) -> None:
    """Run some steps and print the peak."""
    step = make_step(case, StepSetting(**json.loads(setting)))
    reset_peak_rss()
    for _ in range(_STEPS):
        step()
    print(peak_rss_bytes())


if __name__ == "__main__":
    main(*sys.argv[1:])
