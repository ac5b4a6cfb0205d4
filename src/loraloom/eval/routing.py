"""Where mixtures send the tokens of an evaluation: by layer and expert, task, and word.

Axes: T tokens, K top_k, E experts, V vocabulary.

Everything is summed up batch by batch, so memory does not grow with the tokens. The tokens are
those that the model reads to score a question: contexts once, and every choice's continuation
without its last token. Scores that were kept from before cost no forward and are not covered.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.method import AdapterConfig
from loraloom.generation.scoring import OnRouting, RoutedRows
from loraloom.models.host import Host
from loraloom.routing.collapse import find_collapse
from loraloom.routing.record import LayerRouting, RouterName
from loraloom.routing.tally import (
    RoutingTotals,
    load_shares,
    load_similarity,
    loads_by_class,
    mutual_information_bits,
    routing_totals,
    specialisation_bits,
)

NUM_WORDS = 12
"""Tokens that are named for each expert."""

WORD_PRIOR = 10
"""Choices that a token is taken to have made before, as all tokens do; rare ones count less."""

MAX_EXAMPLE_TOKENS = 160
"""Of a task's first question, whose tokens are kept one by one."""

TOKEN_CLASSES = ("start of a word", "rest of a word", "number", "sign", "space")

_SPACES = "Ġ▁ "
"""What tokenizers write in front of a token that begins a word."""
_CONTINUES = "##"
_BLANKS = "ĊĉĠčĩ▁"
"""White space as byte-level tokenizers write it."""


@dataclass
class _TaskTally:
    """The routing of one adapter in one task."""

    questions: set[int] = field(default_factory=set)
    """Places of those that were scored now."""
    totals: RoutingTotals | None = None
    example: tuple[list[int], dict[int | str, list[int]]] | None = None
    """The first question's context as token ids, and the first choice of each, by router."""

    def summarise(self, tokenizer: PreTrainedTokenizerBase, num_questions: int) -> dict[str, Any]:
        totals = self.totals
        summary: dict[str, Any] = {
            "num_questions": num_questions,
            "num_questions_covered": len(self.questions),
            "num_tokens": 0 if totals is None else totals.num_tokens,
        }
        if totals is not None:
            summary |= {
                "load": _rounded(totals.load),
                "effective_experts": _rounded(totals.effective_experts),
                "mean_probabilities": _rounded(load_shares(totals.probabilities)),
                "mean_entropy_bits": _rounded(totals.mean_entropy_bits),
                "token_entropy_bits": _rounded(totals.token_entropy_bits),
            }
        if self.example is not None:
            token_ids, chosen = self.example
            summary["example"] = {
                "tokens": token_texts(token_ids, tokenizer),
                "experts": {str(router): experts for router, experts in chosen.items()},
            }
        return summary


@dataclass
class _AdapterTally:
    """The routing of one adapter in all tasks."""

    config: AdapterConfig
    tasks: dict[str, _TaskTally] = field(default_factory=dict)
    word_layers: Sequence[int] = ()
    """Places in the record of the routers whose tokens are counted one by one."""
    word_counts: Tensor | None = None
    """How often each token of the vocabulary chose each expert there, [layers, V, E] int32."""
    topic_loads: dict[str, Tensor] = field(default_factory=dict)
    """The load of each topic's tokens, [N, E]; see `RoutingTally.of`."""
    class_loads: Tensor | None = None
    """The load of each class of tokens (TOKEN_CLASSES), [C, N, E]."""

    @property
    def num_chosen(self) -> int:
        """Experts that a token chooses; the one of most weight where a router mixes all."""
        return self.config.experts_per_token or 1

    def count_words(
        self, token_ids: Tensor, routing: Sequence[LayerRouting], vocab_size: int
    ) -> None:
        """Count the choices of a forward's tokens, [T]."""
        if self.word_counts is None:
            self.word_layers = some_layers(len(routing))
            num_experts = max(record.num_experts for record in routing)
            shape = (len(self.word_layers), vocab_size, num_experts)
            self.word_counts = torch.zeros(shape, dtype=torch.int32)
        one = torch.ones((), dtype=torch.int32)
        for counts, layer in zip(self.word_counts, self.word_layers, strict=True):
            chosen = routing[layer].selected_experts[:, : self.num_chosen].cpu()  # (T, K)
            counts.index_put_((token_ids[:, None], chosen), one, accumulate=True)

    def count_classes(self, classes: Tensor, routing: Sequence[LayerRouting]) -> None:
        """Add up where each class of tokens went, [T]."""
        loads = loads_by_class(routing, classes, len(TOKEN_CLASSES))
        self.class_loads = loads if self.class_loads is None else self.class_loads + loads

    def count_topics(self, topics: Sequence[str], routing: Sequence[LayerRouting]) -> None:
        """Add up where the tokens of each topic went, [T]."""
        places = {topic: place for place, topic in enumerate(dict.fromkeys(topics))}
        classes = torch.tensor([places[topic] for topic in topics])
        for topic, load in zip(places, loads_by_class(routing, classes, len(places)), strict=True):
            known = self.topic_loads.get(topic)
            self.topic_loads[topic] = load if known is None else known + load

    def summarise(
        self, tokenizer: PreTrainedTokenizerBase, num_questions: Mapping[str, int]
    ) -> dict[str, Any]:
        covered = {task: one.totals for task, one in self.tasks.items() if one.totals is not None}
        some = next(iter(covered.values()), None)
        layers = [] if some is None else [router_label(router) for router in some.routers]
        return {
            "num_experts": self.config.experts_per_router,
            "top_k": self.config.experts_per_token or self.config.experts_per_router,
            "layers": layers,
            "experts_by_layer": [] if some is None else list(some.num_experts),
            "tasks": {
                task: one.summarise(tokenizer, num_questions[task])
                for task, one in self.tasks.items()
            },
            "similarity": [
                _compare(first, second, covered) for first, second in combinations(covered, 2)
            ],
            "specialisation": self._specialisation(),
            "words": self._words(layers, tokenizer),
            "warnings": self._warnings(list(covered.values())),
        }

    def _specialisation(self) -> dict[str, Any]:
        """Tell by layer what an expert says about the topic and about the class of a token."""
        loads: dict[str, dict[str, Tensor]] = {}
        if len(self.topic_loads) > 1:
            loads["topics"] = self.topic_loads
        if self.class_loads is not None:
            by_class = zip(TOKEN_CLASSES, self.class_loads, strict=True)
            loads["token_classes"] = {name: load for name, load in by_class if load.any()}
        found = {}
        for kind, by_name in loads.items():
            stacked = torch.stack([*by_name.values()])  # (C, N, E)
            apart = _rounded(specialisation_bits(stacked))
            bits = _rounded(mutual_information_bits(stacked))
            found[kind] = {"bits": bits, "of": dict(zip(by_name, apart, strict=True))}
        return found

    def _words(
        self, layers: Sequence[int | str], tokenizer: PreTrainedTokenizerBase
    ) -> list[dict[str, Any]]:
        if self.word_counts is None:
            return []

        def describe(token: int, expert: int, counts: Tensor) -> dict[str, Any]:
            (text,) = token_texts([token], tokenizer)
            count = int(counts[token, expert])
            share = round(count * self.num_chosen / int(counts[token].sum()), 4)
            return {"token": text, "count": count, "share": share}

        return [
            {
                "layer": layers[layer],
                "experts": [
                    [describe(token, expert, counts) for token in tokens]
                    for expert, tokens in enumerate(words_by_expert(counts))
                ],
            }
            for layer, counts in zip(self.word_layers, self.word_counts, strict=True)
        ]

    def _warnings(self, totals: Sequence[RoutingTotals]) -> list[str]:
        """Judge the load over all tasks."""
        if not totals or self.config.experts_per_token is None:
            return []
        together = reduce(operator.add, totals)
        rows = together.tokens_per_expert.long().tolist()
        counts = {
            router: row[:size]
            for router, size, row in zip(together.routers, together.num_experts, rows, strict=True)
        }
        found = find_collapse(counts, self.config.experts_per_token)
        return [f"{text}; train again: {self.config.collapse_advice}" for text in found.values()]


def _compare(first: str, second: str, totals: Mapping[str, RoutingTotals]) -> dict[str, Any]:
    by_layer = load_similarity(totals[first].load, totals[second].load)
    figures = {"mean": _rounded(by_layer.mean()), "by_layer": _rounded(by_layer)}
    return {"first": first, "second": second, **figures}


def _rounded(values: Tensor) -> Any:
    """Values as lists with six decimals."""
    return values.double().round(decimals=6).tolist()


class RoutingTally:
    """Adds up the routing of every mixture in an evaluation."""

    def __init__(
        self, host: Host, adapters: Sequence[str | None], tokenizer: PreTrainedTokenizerBase
    ):
        configs = {name: host.adapter(name).config for name in adapters if name is not None}
        self._vocab_size = host.config.vocab_size
        self.adapters = {
            name: _AdapterTally(config)
            for name, config in configs.items()
            if config.experts_per_router > 0
        }
        if self.adapters:
            self._classes = token_classes(tokenizer, self._vocab_size)

    def of(self, task: str, groups: Sequence[str | None] = ()) -> OnRouting | None:
        """Give what takes in a task's batches; None if there is no mixture."""
        topics = [task if group in (None, task) else f"{task}/{group}" for group in groups]
        for adapter in self.adapters.values():
            adapter.tasks[task] = _TaskTally()
        return (lambda routed: self._add(task, topics, routed)) if self.adapters else None

    def _add(self, task: str, topics: Sequence[str], routed: RoutedRows) -> None:
        adapter = self.adapters[routed.adapter]
        of_task, totals = adapter.tasks[task], routing_totals(routed.routing)
        of_task.questions.update(routed.places)
        of_task.totals = totals if of_task.totals is None else of_task.totals + totals
        token_ids = torch.tensor([token for row in routed.rows for token in row.input_ids])
        adapter.count_words(token_ids, routed.routing, self._vocab_size)
        adapter.count_classes(self._classes[token_ids], routed.routing)
        adapter.count_topics(
            [
                topics[place] if topics else task
                for place, row in zip(routed.places, routed.rows, strict=True)
                for _ in row.input_ids
            ],
            routed.routing,
        )
        of_task.example = of_task.example or _example(routed, adapter.word_layers)


def router_label(router: RouterName) -> int | str:
    """Name a router in the JSON file: its layer, and its projection if it has one of its own."""
    layer, projection = router
    return layer if projection is None else f"{layer}.{projection}"


def some_layers(num_layers: int) -> list[int]:
    """The first, the middle and the last."""
    return sorted({0, num_layers // 2, num_layers - 1})


def _example(
    routed: RoutedRows, layers: Sequence[int]
) -> tuple[list[int], dict[int | str, list[int]]] | None:
    """Take the context of the first question's first choice out of a forward; None if not there."""
    start = 0
    for place, row in zip(routed.places, routed.rows, strict=True):
        if place == 0 and 0 in row.choices:
            length = min(row.branches.count(0), MAX_EXAMPLE_TOKENS)
            tokens = slice(start, start + length)
            chosen = {
                router_label(record.router): record.selected_experts[tokens, 0].tolist()
                for record in map(routed.routing.__getitem__, layers)
            }
            return row.input_ids[:length], chosen
        start += len(row.input_ids)
    return None


def summarise_routing(
    tally: RoutingTally, tokenizer: PreTrainedTokenizerBase, num_questions: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Give the routing by adapter, as it stands in the JSON file under `routing`."""
    return {
        name: adapter.summarise(tokenizer, num_questions)
        for name, adapter in tally.adapters.items()
    }


def words_by_expert(counts: Tensor, num_words: int = NUM_WORDS) -> list[list[int]]:
    """Find the tokens that go to an expert more than others do.

    A token's share at an expert, after `WORD_PRIOR` choices like everybody's, is divided by the
    expert's load; the tokens with the largest quotients above 1 are taken.
    """
    seen = counts.sum(-1).nonzero().squeeze(1)
    choices = counts[seen].double()  # (T, E)
    load = load_shares(choices.sum(0))
    shares = (choices + WORD_PRIOR * load) / (choices.sum(-1, keepdim=True) + WORD_PRIOR)
    lift = shares / load.where(load > 0, 1)
    best = lift.topk(min(num_words, len(seen)), dim=0)
    return [
        [int(seen[row]) for value, row in zip(values, rows, strict=True) if value > 1]
        for values, rows in zip(best.values.T.tolist(), best.indices.T.tolist(), strict=True)
    ]


def token_texts(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each token's text; the vocabulary's own name of it where it is no whole character."""
    texts = [str(tokenizer.decode([token_id])) for token_id in token_ids]
    names = tokenizer.convert_ids_to_tokens(list(token_ids))
    return [
        str(name) if "\ufffd" in text or not text else text
        for text, name in zip(texts, names, strict=True)
    ]


def token_classes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """Give the class of each token of a vocabulary, as a place in TOKEN_CLASSES, [V]."""
    ids = list(range(min(vocab_size, len(tokenizer))))
    names = map(str, tokenizer.convert_ids_to_tokens(ids))
    texts = tokenizer.batch_decode([[token_id] for token_id in ids])
    found = [TOKEN_CLASSES.index(class_of(*pair)) for pair in zip(names, texts, strict=True)]
    classes = torch.full((vocab_size,), TOKEN_CLASSES.index("sign"))
    classes[: len(ids)] = torch.tensor(found)
    return classes


def class_of(name: str, text: str) -> str:
    """Give the class of a token."""
    if not text.strip() and not name.strip(_BLANKS + " \n\t\r"):
        return "space"
    text = text.strip().removeprefix(_CONTINUES)
    if text.isdigit():
        return "number"
    if not text.isalpha():
        return "sign"
    return "start of a word" if name[0] in _SPACES else "rest of a word"
