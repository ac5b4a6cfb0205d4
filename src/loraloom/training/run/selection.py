"""Which weights of a job are its best, and when it no longer gets better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


def metric_mode(metric: str | None) -> str:
    """Tell which way a metric gets better: `min` for a loss, `max` for every other."""
    return "min" if metric is None or metric.endswith("loss") else "max"


@dataclass
class Selection:
    """The best evaluation of a job so far.

    Args:
        metric: Name of the metric that decides; None: nothing is held out, the last weights count.
        value: Its best value.
        step: The step after which it was measured.
        metrics: Everything that was measured then.
        evaluations_since: Evaluations after it.
    """

    metric: str | None
    value: float | None = None
    step: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    evaluations_since: int = 0

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take an evaluation in."""
        if self.metric is None:
            return False
        value = metrics[self.metric]
        if not self._is_better(value):
            self.evaluations_since += 1
            return False
        self.value, self.step, self.metrics = value, step, dict(metrics)
        self.evaluations_since = 0
        return True

    def _is_better(self, value: float) -> bool:
        if self.value is None:
            return True
        return value > self.value if metric_mode(self.metric) == "max" else value < self.value
