"""What jobs can minimise: an objective, one file."""

from __future__ import annotations

from loraloom.config.objective import CpoConfig, DpoConfig, SftConfig
from loraloom.training.step.objectives.cpo import Cpo
from loraloom.training.step.objectives.dpo import Dpo
from loraloom.training.step.objectives.objective import Objective, ObjectiveTerms, ScoredSamples
from loraloom.training.step.objectives.sft import Sft

__all__ = ["Objective", "ObjectiveTerms", "ScoredSamples", "build_objective"]


def build_objective(config: SftConfig | DpoConfig | CpoConfig) -> Objective:
    """Make the objective that a configuration names."""
    match config:
        case DpoConfig():
            return Dpo(config)
        case CpoConfig():
            return Cpo(config)
        case SftConfig():
            return Sft()
