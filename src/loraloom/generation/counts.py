"""What an engine did so far, by its models' names."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Literal

from loraloom.routing.record import LayerRouting, RouterName
from loraloom.routing.tally import expert_loads

Outcome = Literal["stop", "length", "error", "cancelled"]
"""How a request ended."""


@dataclass
class EngineCounts:
    """Numbers that only grow.

    Args:
        requests: That have ended, by model and outcome.
        prompt_tokens: That were read or known.
        cached_tokens: Those that were known from prompts before.
        generated_tokens: That were chosen.
        expert_tokens: By model and router, how often experts were chosen in the steps that were
            looked at.
        num_preempted: Rows that were sent back to the queue.
        num_steps: Steps done.
    """

    requests: Counter[tuple[str, Outcome]] = field(default_factory=Counter)
    prompt_tokens: Counter[str] = field(default_factory=Counter)
    cached_tokens: Counter[str] = field(default_factory=Counter)
    generated_tokens: Counter[str] = field(default_factory=Counter)
    expert_tokens: dict[str, Counter[tuple[RouterName, int]]] = field(
        default_factory=lambda: defaultdict(Counter)
    )
    num_preempted: int = 0
    num_steps: int = 0

    def add_routing(self, model: str, routing: list[LayerRouting]) -> None:
        """Count where a model's routers sent tokens; those that mix all experts send none."""
        chosen = [
            record for record in routing if record.selected_experts.shape[-1] < record.num_experts
        ]
        if not chosen:
            return
        counter = self.expert_tokens[model]
        for record, row in zip(chosen, expert_loads(chosen).long().tolist(), strict=True):
            for expert, number in enumerate(row[: record.num_experts]):
                counter[record.router, expert] += number
