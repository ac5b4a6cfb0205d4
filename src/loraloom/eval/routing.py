"""Where mixtures send the tokens of an evaluation: by layer and expert, task, and kind of token.

Axes: C classes, N routers, T tokens, K top_k, E experts, V vocabulary. The tokens are those that
are read to score a question: contexts once, and every choice without its last token. Scores that
were kept from before cost no forward and are not covered.
"""

import operator
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.contract import AdapterConfig
from loraloom.adapters.routed.method import expert_names
from loraloom.eval.results import Fields
from loraloom.generation.scoring import OnRouting, RoutedRows
from loraloom.host.host import Host
from loraloom.routing import tally
from loraloom.routing.record import LayerRouting, RouterName

MAX_EXAMPLE_TOKENS = 160
TOKEN_CLASSES = ("start of a word", "rest of a word", "number", "sign", "space")

# What tokenizers write in front of a token that begins a word.
_SPACES = "Ġ▁ "
# White space as byte-level tokenizers write it, and as it is.
_BLANKS = "ĊĉĠčĩ▁ \n\t\r"


class RoutingTally:
    """Adds up the routing of every mixture in an evaluation."""

    def __init__(self, host: Host, adapters: list[str | None], tokenizer: PreTrainedTokenizerBase):
        configs = {name: host.adapter(name).config for name in adapters if name is not None}
        configs = {n: config for n, config in configs.items() if config.experts_per_router > 0}
        classes = token_classes(tokenizer, host.config.vocab_size) if configs else torch.zeros(0)
        self.adapters = {n: _AdapterTally(c, classes, tokenizer) for n, c in configs.items()}

    def of(
        self,
        task: str,
        num_questions: int,
        groups: Sequence[str | None] = (),
        rows_per_question: int = 1,
    ) -> OnRouting | None:
        """Give what takes in a task's batches; None if there is no mixture."""
        topics = [task if group in (None, task) else f"{task}/{group}" for group in groups]
        for adapter in self.adapters.values():
            adapter.num_questions[task], adapter.covered[task] = num_questions, set()
        if not self.adapters:
            return None

        def add(routed: RoutedRows) -> None:
            if routed.adapter in self.adapters:  # no mixture that is an expert of one of these
                self.adapters[routed.adapter].add(task, topics, routed, rows_per_question)

        return add

    def summarise(self) -> dict[str, Fields]:
        """Give the routing by adapter, as it stands in the JSON file under `routing`."""
        return {n: one.summarise() for n, one in self.adapters.items() if one.num_questions}


class _AdapterTally:
    """The routing of one adapter in all tasks; `classes` of the vocabulary's tokens, [V]."""

    def __init__(self, config: AdapterConfig, classes: Tensor, tokenizer: PreTrainedTokenizerBase):
        self.config, self.classes, self.tokenizer = config, classes, tokenizer
        self.num_questions: dict[str, int] = {}
        self.covered: dict[str, set[int]] = {}  # by task, the places of questions scored now
        self.totals: dict[str, tally.RoutingTotals] = {}
        self.examples: dict[str, dict[str, Any]] = {}
        self.loads: dict[str, dict[str, Tensor]] = {"topics": {}, "token_classes": {}}  # (N, E)

    def add(self, task: str, topics: Sequence[str], routed: RoutedRows, size: int) -> None:
        """Take in a forward; its tokens' topics are by a question's place, or the task."""
        routing, rows = routed.routing, routed.rows
        totals = tally.RoutingTotals.of(routing)
        self.covered[task].update(place // size for place in routed.places)
        self.totals[task] = self.totals[task] + totals if task in self.totals else totals
        token_ids = torch.tensor([token for row in rows for token in row.input_ids])  # (T,)
        self._add_loads("token_classes", TOKEN_CLASSES, self.classes[token_ids], routing)
        topic_of = [topics[place] if topics else task for place in routed.places]
        number = {topic: place for place, topic in enumerate(dict.fromkeys(topic_of))}
        repeated = zip(topic_of, rows, strict=True)
        classes = torch.tensor([number[topic] for topic, row in repeated for _ in row.input_ids])
        self._add_loads("topics", [*number], classes, routing)
        start = 0
        for place, row in zip(routed.places, rows, strict=True):
            if place == 0 and 0 in row.choices and task not in self.examples:
                end = start + min(row.branches.count(0), MAX_EXAMPLE_TOKENS)
                records = [routing[at] for at in sorted({0, len(routing) // 2, len(routing) - 1})]
                experts = {one.router: one.selected_experts[start:end, 0] for one in records}
                self.examples[task] = {
                    "tokens": token_texts(row.input_ids[: end - start], self.tokenizer),
                    "experts": {str(_label(router)): e.tolist() for router, e in experts.items()},
                }
            start += len(row.input_ids)

    def _add_loads(
        self, kind: str, names: Sequence[str], classes: Tensor, routing: Sequence[LayerRouting]
    ) -> None:
        loads, added = self.loads[kind], tally.loads_by_class(routing, classes, len(names))
        for name, load in zip(names, added, strict=True):
            loads[name] = loads[name] + load if name in loads else load

    def summarise(self) -> Fields:
        totals = reduce(operator.add, self.totals.values()) if self.totals else None
        return {
            "num_experts": self.config.experts_per_router,
            "expert_names": expert_names(self.config),
            "top_k": self.config.experts_per_token or self.config.experts_per_router,
            "layers": [_label(router) for router in totals.routers] if totals else [],
            "experts_by_layer": list(totals.num_experts) if totals else [],
            "tasks": {task: self._task(task) for task in self.num_questions},
            "specialisation": self._specialisation(),
            "warnings": self._warnings(totals) if totals else [],
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
            summary["effective_experts"] = _rounded(totals.effective_experts)
            summary["mean_probabilities"] = _rounded(totals.mean_probabilities)
            summary["mean_entropy_bits"] = _rounded(totals.mean_entropy_bits)
            summary["token_entropy_bits"] = _rounded(totals.token_entropy_bits)
        if task in self.examples:
            summary["example"] = self.examples[task]
        return summary

    def _specialisation(self) -> Any:
        """Tell by layer what an expert says about the topic and about the class of a token."""
        found = {}
        for kind, by_name in self.loads.items():
            loads = {name: load for name, load in by_name.items() if load.any()}
            if len(loads) > (kind == "topics"):  # a single topic says nothing
                stacked = torch.stack([*loads.values()])  # (C, N, E)
                apart = dict(zip(loads, _rounded(tally.specialisation_bits(stacked)), strict=True))
                bits = _rounded(tally.mutual_information_bits(stacked))
                found[kind] = {"bits": bits, "of": apart}
        return found

    def _warnings(self, totals: tally.RoutingTotals) -> list[str]:
        if self.config.experts_per_token is None or not self.config.collapse_advice:
            return []
        found = tally.find_collapse(totals.choices, self.config.experts_per_token)
        return [f"{text}; train again: {self.config.collapse_advice}" for text in found.values()]


def _label(router: RouterName) -> int | str:
    """Name a router in the JSON file: its layer, and its projection if it has one of its own."""
    layer, projection = router
    return layer if projection is None else f"{layer}.{projection}"


def _rounded(values: Tensor) -> Any:
    return values.double().round(decimals=6).tolist()


def token_texts(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Each token's text; the vocabulary's own name of it where it is no whole character."""
    # a decoder may leave out a space in front, but not after another token
    texts = [str(tokenizer.decode([token_id])) for token_id in token_ids]
    both = [str(tokenizer.decode([*pair])) for pair in pairwise(token_ids)]
    texts = texts[:1] + [pair[len(text) :] for pair, text in zip(both, texts, strict=False)]
    pairs = zip(texts, map(str, tokenizer.convert_ids_to_tokens(list(token_ids))), strict=True)
    return [name if "\ufffd" in text or not text else text for text, name in pairs]


def token_classes(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> Tensor:
    """Give the class of each token of a vocabulary, as a place in TOKEN_CLASSES, [V]."""
    ids = list(range(min(vocab_size, len(tokenizer))))
    names = [*map(str, tokenizer.convert_ids_to_tokens(ids))]
    texts = tokenizer.batch_decode([[token_id] for token_id in ids])
    # WordPiece marks the rest of a word, others its start; these may have a few ## as text.
    num_rests = sum(name.startswith("##") and name[2:].isalpha() for name in names)
    marks_rests = num_rests > sum(name[:1] in _SPACES and name[1:].isalpha() for name in names)
    kinds = [class_of(*pair, marks_rests=marks_rests) for pair in zip(names, texts, strict=True)]
    kinds += ["sign"] * (vocab_size - len(kinds))
    return torch.tensor([TOKEN_CLASSES.index(kind) for kind in kinds])


def class_of(name: str, text: str, *, marks_rests: bool) -> str:
    if not text.strip() and not name.strip(_BLANKS):
        return "space"
    text = text.strip().removeprefix("##")
    if text.isdigit():
        return "number"
    if not text.isalpha():
        return "sign"
    starts = not name.startswith("##") if marks_rests else name[0] in _SPACES
    return "start of a word" if starts else "rest of a word"
