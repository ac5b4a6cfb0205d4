"""Telling the user, once, that a mixture's routers have collapsed."""

from __future__ import annotations

from dataclasses import dataclass, field

from loraloom.adapters.config import AdapterConfig
from loraloom.routing.collapse import Choices, find_collapse, has_enough_choices
from loraloom.routing.record import RouterName
from loraloom.training.step.micro_batch import add_counts

WINDOW_STEPS = 25
"""Steps whose load is judged together, so that one odd step warns nobody."""


@dataclass
class CollapseWatch:
    """Adds up a job's load, and judges it window by window.

    Args:
        num_steps: Steps of the window so far.
        tokens_per_expert: Their choices, by router.
        warnings: What was said already, by kind; a kind is said once.
    """

    num_steps: int = 0
    tokens_per_expert: dict[RouterName, list[int]] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)

    def take(self, step: int, tokens_per_expert: Choices, config: AdapterConfig) -> list[str]:
        """Take a step's choices in; give new warnings.

        A window ends after `WINDOW_STEPS`, or later when it has too few tokens to be judged.
        """
        self.num_steps += 1
        self.tokens_per_expert = add_counts(self.tokens_per_expert, tokens_per_expert)
        if self.num_steps < WINDOW_STEPS or not has_enough_choices(self.tokens_per_expert):
            return []
        collapses = find_collapse(self.tokens_per_expert, config.experts_per_token or 0)
        first = step - self.num_steps + 1
        new = {
            kind: f"steps {first} to {step}: {text}; {config.collapse_advice}"
            for kind, text in collapses.items()
            if kind not in self.warnings
        }
        self.warnings |= new
        self.num_steps, self.tokens_per_expert = 0, {}
        return list(new.values())
