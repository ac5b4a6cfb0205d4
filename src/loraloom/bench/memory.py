"""Peak resident memory of training steps, each case in a process of its own (Linux).

Run as `python -m loraloom.bench.memory CASE SETTING_JSON`, it prints the peak in bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, replace

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


@dataclass(frozen=True)
class JobsMemory:
    """Peak resident memory of one job's steps, and of several jobs' fused ones.

    Args:
        num_jobs: How many.
        one_bytes: Peak with one job.
        all_bytes: Peak with all of them.
        state_bytes: One job's weights, gradients and AdamW state.
    """

    num_jobs: int
    one_bytes: int
    all_bytes: int
    state_bytes: int

    @property
    def share(self) -> float:
        """All jobs' peak over as many times one job's."""
        return self.all_bytes / (self.num_jobs * self.one_bytes)

    @property
    def added(self) -> float:
        """What each further job adds, over its weights, gradients and AdamW state."""
        added = (self.all_bytes - self.one_bytes) / (self.num_jobs - 1)
        return added / self.state_bytes

    def describe(self) -> str:
        """Return the figures in words."""
        return (
            f"peak memory: 1 job {self.one_bytes / 1e9:.2f} GB, {self.num_jobs} jobs "
            f"{self.all_bytes / 1e9:.2f} GB, {self.share:.2f} of {self.num_jobs} times one; "
            f"each further job adds {self.added:.2f} times its weights, gradients and AdamW state "
            f"({self.state_bytes / 1e9:.3f} GB)"
        )


def jobs_memory(case: str, setting: StepSetting, adapter: Adapter) -> JobsMemory:
    """Measure the peaks of one job and of `num_jobs`, a process each.

    Args:
        case: Its name.
        setting: With the number of jobs.
        adapter: One of them, whose weights are counted.
    """
    weight_bytes = sum(p.numel() * p.element_size() for p in adapter.parameters())
    return JobsMemory(
        setting.num_jobs,
        step_peak_rss_bytes(case, replace(setting, num_jobs=1)),
        step_peak_rss_bytes(case, setting),
        state_bytes=4 * weight_bytes,  # weights, gradients, two of AdamW's
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
