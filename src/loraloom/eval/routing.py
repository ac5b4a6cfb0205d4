"""Where mixtures send the tokens of an evaluation: by layer, expert and task.

Axes: C classes, N routers, T tokens, K top_k, E experts. The tokens are those that
are read to score a question: contexts once, and every choice without its last token. Scores that
were kept from before cost no forward and are not covered.
"""

import operator
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.contract import AdapterConfig
from loraloom.adapters.routed.method import expert_names
from loraloom.data.tokens import name_of_token
from loraloom.eval.results import Fields
from loraloom.generation.scoring import OnRouting, RoutedRows
from loraloom.host.host import Host
from loraloom.routing import tally
from loraloom.routing.record import RouterName

MAX_EXAMPLE_TOKENS = 160


class RoutingTally:
    """Adds up the routing of every mixture in an evaluation."""

    def __init__(
        self, host: Host, adapters: Sequence[str | None], tokenizer: PreTrainedTokenizerBase
    ):
        self.adapters: dict[str, _AdapterTally] = {}
        for name in filter(None, adapters):
            config = host.adapter(name).config
            if config.experts_per_router > 0:
                self.adapters[name] = _AdapterTally(config, tokenizer)

    def observe(
        self,
        task: str,
        num_questions: int,
        groups: Sequence[str | None] = (),
        rows_per_question: int = 1,
    ) -> OnRouting | None:
        """Return a function that adds a task's batches; None if there is no mixture."""
        if not self.adapters:
            return None
        topics = {}
        for question, group in enumerate(groups):
            if group not in (None, task):
                topics[question] = f"{task}/{group}"
        for adapter in self.adapters.values():
            adapter.num_questions[task] = num_questions
            adapter.covered[task] = set()

        def add(routed: RoutedRows) -> None:
            adapter = self.adapters.get(routed.adapter)
            if adapter is not None:  # no mixture that is an expert of one of these
                questions = [row // rows_per_question for row in routed.places]
                adapter.covered[task].update(questions)
                row_topics = [topics.get(question, task) for question in questions]
                adapter.add(task, row_topics, routed)

        return add

    def summarise(self) -> dict[str, Fields]:
        summary = {}
        for name, adapter in self.adapters.items():
            if adapter.num_questions:
                summary[name] = adapter.summarise()
        return summary


class _AdapterTally:
    """The routing of one adapter in all tasks."""

    def __init__(self, config: AdapterConfig, tokenizer: PreTrainedTokenizerBase):
        self.config = config
        self.tokenizer = tokenizer
        self.num_questions: dict[str, int] = {}
        self.covered: dict[str, set[int]] = {}  # by task, the questions scored now
        self.totals: dict[str, tally.RoutingTotals] = {}
        self.examples: dict[str, dict[str, Any]] = {}
        self.loads: dict[str, Tensor] = {}  # by topic, (N, E)

    def add(self, task: str, row_topics: Sequence[str], routed: RoutedRows) -> None:
        totals = tally.RoutingTotals.of(routed.routing)
        totals = replace(totals, sums=totals.sums.cpu())
        if task in self.totals:
            totals = self.totals[task] + totals
        self.totals[task] = totals
        self._add_loads(row_topics, routed)
        if task not in self.examples:
            self._add_example(task, routed)

    def _add_loads(self, row_topics: Sequence[str], routed: RoutedRows) -> None:
        topics = list(dict.fromkeys(row_topics))
        token_topics: list[int] = []
        for row, topic in zip(routed.rows, row_topics, strict=True):
            token_topics += [topics.index(topic)] * len(row.input_ids)
        device = routed.routing[0].router_logits.device
        classes = torch.tensor(token_topics, device=device)  # (T,)
        loads = tally.loads_by_class(routed.routing, classes, len(topics)).cpu()  # (C, N, E)
        for topic, load in zip(topics, loads, strict=True):
            self.loads[topic] = self.loads[topic] + load if topic in self.loads else load

    def _add_example(self, task: str, routed: RoutedRows) -> None:
        """Keep the first question's tokens, and their first experts in three layers."""
        start = 0
        for index, row in zip(routed.places, routed.rows, strict=True):
            if index == 0 and 0 in row.choices:
                num_tokens = min(row.branches.count(0), MAX_EXAMPLE_TOKENS)
                num_routers = len(routed.routing)
                experts = {}
                for layer in sorted({0, num_routers // 2, num_routers - 1}):
                    record = routed.routing[layer]
                    selected = record.selected_experts[start : start + num_tokens, 0]
                    experts[str(_label(record.router))] = selected.tolist()
                token_ids = row.input_ids[:num_tokens]
                texts = [name_of_token(self.tokenizer, token_id) for token_id in token_ids]
                self.examples[task] = {"tokens": texts, "experts": experts}
                return
            start += len(row.input_ids)

    def summarise(self) -> Fields:
        layers: list[int | str] = []
        num_experts: list[int] = []
        warnings: list[str] = []
        if self.totals:
            totals = reduce(operator.add, self.totals.values())
            layers = [_label(router) for router in totals.routers]
            num_experts = list(totals.num_experts)
            warnings = self._warnings(totals)
        experts_per_router = self.config.experts_per_router
        return {
            "num_experts": experts_per_router,
            "expert_names": expert_names(self.config),
            "top_k": self.config.experts_per_token or experts_per_router,
            "layers": layers,
            "experts_by_layer": num_experts,
            "tasks": {task: self._task(task) for task in self.num_questions},
            "specialisation": self._specialisation(),
            "warnings": warnings,
        }

    def _task(self, task: str) -> Fields:
        totals = self.totals.get(task)
        summary: Fields = {
            "num_questions": self.num_questions[task],
            "num_questions_covered": len(self.covered[task]),
            "num_tokens": 0 if totals is None else totals.num_tokens,
        }
        if totals is not None:
            summary["load"] = _rounded(totals.load)
            summary["effective_experts"] = _rounded(tally.effective_number(totals.load))
            summary["mean_probabilities"] = _rounded(totals.mean_probabilities)
            mean_entropy = tally.entropy_bits(totals.mean_probabilities)
            summary["mean_entropy_bits"] = _rounded(mean_entropy)
            summary["token_entropy_bits"] = _rounded(totals.token_entropy_bits)
        if task in self.examples:
            summary["example"] = self.examples[task]
        return summary

    def _specialisation(self) -> Fields:
        """Tell by layer what an expert says about the topic of a token."""
        loads = {topic: load for topic, load in self.loads.items() if load.any()}
        if len(loads) < 2:  # a single topic says nothing
            return {}
        stacked = torch.stack([*loads.values()])  # (C, N, E)
        distances = _rounded(tally.specialisation_bits(stacked))
        bits = _rounded(tally.mutual_information_bits(stacked))
        return {"topics": {"bits": bits, "of": dict(zip(loads, distances, strict=True))}}

    def _warnings(self, totals: tally.RoutingTotals) -> list[str]:
        advice = self.config.collapse_advice
        if self.config.experts_per_token is None or not advice:
            return []
        collapse = tally.find_collapse(totals.choices, self.config.experts_per_token)
        return [] if collapse is None else [f"{collapse}; train again: {advice}"]


def _label(router: RouterName) -> int | str:
    """Name a router in the JSON file: its layer, and its projection if it has one of its own."""
    layer, projection = router
    return layer if projection is None else f"{layer}.{projection}"


def _rounded(values: Tensor) -> Any:
    return values.double().round(decimals=6).tolist()
