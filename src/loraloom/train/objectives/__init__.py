"""What jobs can minimise: an objective, one file."""

from __future__ import annotations

from loraloom.config.objective import CpoConfig, DpoConfig, SftConfig
from loraloom.train.objectives.cpo import Cpo
from loraloom.train.objectives.dpo import Dpo
from loraloom.train.objectives.objective import Objective, ObjectiveTerms, ScoredSamples
from loraloom.train.objectives.sft import Sft

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
