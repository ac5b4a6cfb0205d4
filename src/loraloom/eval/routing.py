"""Where mixtures send the tokens of an evaluation: by layer and expert, task, and word.

Axes: C classes, N routers, T tokens, K top_k, E experts, V vocabulary.

Everything is summed up batch by batch, so memory does not grow with the tokens. The tokens are
those that the model reads to score a question: contexts once, and every choice's continuation
without its last token. Scores that were kept from before cost no forward and are not covered.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.method import AdapterConfig
from loraloom.eval.results import AdapterRouting, TaskRouting
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


class RoutingTally:
    """Adds up the routing of every mixture in an evaluation."""

    def __init__(
        self, host: Host, adapters: Sequence[str | None], tokenizer: PreTrainedTokenizerBase
    ):
        self._tokenizer = tokenizer
        configs = {name: host.adapter(name).config for name in adapters if name is not None}
        mixtures = {n: config for n, config in configs.items() if config.experts_per_router > 0}
        vocab_size = host.config.vocab_size
        classes = token_classes(tokenizer, vocab_size) if mixtures else torch.zeros(0)
        self._adapters = {n: _AdapterTally(config, classes) for n, config in mixtures.items()}

    def of(self, task: str, groups: Sequence[str | None] = ()) -> OnRouting | None:
        """Give what takes in a task's batches; None if there is no mixture."""
        topics = [task if group in (None, task) else f"{task}/{group}" for group in groups]
        for adapter in self._adapters.values():
            adapter.questions[task] = set()

        def add(routed: RoutedRows) -> None:
            self._adapters[routed.adapter].add(task, topics, routed)

        return add if self._adapters else None

    def summarise(self, num_questions: Mapping[str, int]) -> dict[str, AdapterRouting]:
        """Give the routing by adapter, as it stands in the JSON file under `routing`."""
        texts = partial(token_texts, tokenizer=self._tokenizer)
        return {n: one.summarise(num_questions, texts) for n, one in self._adapters.items()}


class _AdapterTally:
    """The routing of one adapter in all tasks; `classes` of the vocabulary's tokens, [V]."""

    def __init__(self, config: AdapterConfig, classes: Tensor):
        self.config, self.classes = config, classes
        self.questions: dict[str, set[int]] = {}  # by task, the places of those scored now
        self.totals: dict[str, RoutingTotals] = {}
        self.examples: dict[str, tuple[list[int], dict[str, list[int]]]] = {}
        self.loads: dict[str, dict[str, Tensor]] = {"topics": {}, "token_classes": {}}  # (N, E)
        self.word_layers: list[int] = []
        self.word_counts = torch.zeros(0)

    def add(self, task: str, topics: Sequence[str], routed: RoutedRows) -> None:
        """Take in a forward; its tokens' topics are by a question's place, or the task."""
        routing, rows = routed.routing, routed.rows
        totals = routing_totals(routing)
        self.questions[task].update(routed.places)
        self.totals[task] = self.totals[task] + totals if task in self.totals else totals
        token_ids = torch.tensor([token for row in rows for token in row.input_ids])  # (T,)
        self._count_words(token_ids, routing)
        self._add_loads("token_classes", TOKEN_CLASSES, self.classes[token_ids], routing)
        names = [topics[place] if topics else task for place in routed.places]
        places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        classes = [
            places[name] for name, row in zip(names, rows, strict=True) for _ in row.input_ids
        ]
        self._add_loads("topics", [*places], torch.tensor(classes), routing)
        if task not in self.examples:
            self._keep_example(task, routed)

    def _add_loads(
        self, kind: str, names: Sequence[str], classes: Tensor, routing: Sequence[LayerRouting]
    ) -> None:
        loads, added = self.loads[kind], loads_by_class(routing, classes, len(names))
        for name, load in zip(names, added, strict=True):
            loads[name] = loads[name] + load if name in loads else load

    def _count_words(self, token_ids: Tensor, routing: Sequence[LayerRouting]) -> None:
        """Count how often each token chose each expert of some layers, [layers, V, E]."""
        if not self.word_layers:
            self.word_layers = some_layers(len(routing))
            num_experts = max(record.num_experts for record in routing)
            shape = (len(self.word_layers), len(self.classes), num_experts)
            self.word_counts = torch.zeros(shape, dtype=torch.int32)
        one = torch.ones((), dtype=torch.int32)
        for counts, layer in zip(self.word_counts, self.word_layers, strict=True):
            chosen = routing[layer].selected_experts[:, : self._num_chosen].cpu()  # (T, K)
            counts.index_put_((token_ids[:, None], chosen), one, accumulate=True)

    @property
    def _num_chosen(self) -> int:
        """Experts that a token chooses; the one of most weight where a router mixes all."""
        return self.config.experts_per_token or 1

    def _keep_example(self, task: str, routed: RoutedRows) -> None:
        """Keep the context of the first question's first choice, if it is in the forward."""
        start = 0
        for place, row in zip(routed.places, routed.rows, strict=True):
            if place == 0 and 0 in row.choices:
                length = min(row.branches.count(0), MAX_EXAMPLE_TOKENS)
                records = [routed.routing[layer] for layer in self.word_layers]
                chosen = {
                    str(router_label(one.router)): one.selected_experts[start : start + length, 0]
                    for one in records
                }
                lists = {router: experts.tolist() for router, experts in chosen.items()}
                self.examples[task] = (row.input_ids[:length], lists)
                return
            start += len(row.input_ids)

    def summarise(self, num_questions: Mapping[str, int], texts: Any) -> AdapterRouting:
        some = next(iter(self.totals.values()), None)
        layers = [] if some is None else [router_label(router) for router in some.routers]
        loads = {task: totals.load for task, totals in self.totals.items()}
        similarities = {
            pair: load_similarity(*(loads[task] for task in pair))
            for pair in combinations(loads, 2)
        }
        return {
            "num_experts": self.config.experts_per_router,
            "top_k": self.config.experts_per_token or self.config.experts_per_router,
            "layers": layers,
            "experts_by_layer": [] if some is None else list(some.num_experts),
            "tasks": {t: self._summarise_task(t, num_questions[t], texts) for t in self.questions},
            "similarity": [
                {
                    "first": a,
                    "second": b,
                    "mean": _rounded(by_layer.mean()),
                    "by_layer": _rounded(by_layer),
                }
                for (a, b), by_layer in similarities.items()
            ],
            "specialisation": self._specialisation(),
            "words": [
                {"layer": layers[layer], "experts": self._words(counts, texts)}
                for layer, counts in zip(self.word_layers, self.word_counts, strict=True)
            ],
            "warnings": self._warnings(),
        }

    def _summarise_task(self, task: str, num_questions: int, texts: Any) -> TaskRouting:
        totals = self.totals.get(task)
        summary: TaskRouting = {
            "num_questions": num_questions,
            "num_questions_covered": len(self.questions[task]),
            "num_tokens": 0 if totals is None else totals.num_tokens,
        }
        if totals is not None:
            summary["load"] = _rounded(totals.load)
            summary["effective_experts"] = _rounded(totals.effective_experts)
            summary["mean_probabilities"] = _rounded(load_shares(totals.probabilities))
            summary["mean_entropy_bits"] = _rounded(totals.mean_entropy_bits)
            summary["token_entropy_bits"] = _rounded(totals.token_entropy_bits)
        if task in self.examples:
            token_ids, experts = self.examples[task]
            summary["example"] = {"tokens": texts(token_ids), "experts": experts}
        return summary

    def _specialisation(self) -> Any:
        """Tell by layer what an expert says about the topic and about the class of a token."""
        found = {}
        for kind, by_name in self.loads.items():
            loads = {name: load for name, load in by_name.items() if load.any()}
            if len(loads) > (kind == "topics"):  # a single topic has nothing to tell apart
                stacked = torch.stack([*loads.values()])  # (C, N, E)
                apart = _rounded(specialisation_bits(stacked))
                bits = _rounded(mutual_information_bits(stacked))
                found[kind] = {"bits": bits, "of": dict(zip(loads, apart, strict=True))}
        return found

    def _words(self, counts: Tensor, texts: Any) -> list[list[dict[str, Any]]]:
        """Name the typical tokens of each expert, with how often they chose it."""
        found = []
        for expert, tokens in enumerate(words_by_expert(counts)):
            chosen = counts[tokens, expert].tolist()
            shares = [
                n * self._num_chosen / int(counts[t].sum())
                for t, n in zip(tokens, chosen, strict=True)
            ]
            found.append(
                [
                    {"token": text, "count": count, "share": round(share, 4)}
                    for text, count, share in zip(texts(tokens), chosen, shares, strict=True)
                ]
            )
        return found

    def _warnings(self) -> list[str]:
        """Judge the load over all tasks."""
        if not self.totals or self.config.experts_per_token is None:
            return []
        together = reduce(operator.add, self.totals.values())
        rows = together.tokens_per_expert.long().tolist()
        counts = {
            router: row[:size]
            for router, size, row in zip(together.routers, together.num_experts, rows, strict=True)
        }
        found = find_collapse(counts, self.config.experts_per_token)
        return [f"{text}; train again: {self.config.collapse_advice}" for text in found.values()]


def _rounded(values: Tensor) -> Any:
    """Values as lists with six decimals."""
    return values.double().round(decimals=6).tolist()


def router_label(router: RouterName) -> int | str:
    """Name a router in the JSON file: its layer, and its projection if it has one of its own."""
    layer, projection = router
    return layer if projection is None else f"{layer}.{projection}"


def some_layers(num_layers: int) -> list[int]:
    """The first, the middle and the last."""
    return sorted({0, num_layers // 2, num_layers - 1})


def words_by_expert(counts: Tensor, num_words: int = NUM_WORDS) -> list[list[int]]:
    """Find the tokens that go to an expert more than others do, of counts [V, E].

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
    names = map(str, tokenizer.convert_ids_to_tokens(list(token_ids)))
    return [
        name if "\ufffd" in text or not text else text
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
