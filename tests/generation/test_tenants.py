"""Two customers who always want more get as much, whatever they ask for and whatever was before."""

import random
from collections import Counter
from collections.abc import Callable, Collection
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loraloom.generation.engine import READ_PER_TOKEN, Engine
from loraloom.generation.request import GenerationRequest, Row
from loraloom.generation.runner import PrefixCache
from loraloom.generation.sampling import SamplingConfig
from loraloom.generation.scheduler import EngineLimits
from loraloom.host.choice import Choice
from tests.tiny import METHODS

Make = Callable[[str], GenerationRequest]


def make_request(
    tenant: str, num_prompt: int, num_new: int, adapter: str | None = None, *, echo: bool = False
) -> GenerationRequest:
    """Make a request whose prompt nobody has sent before."""
    prompt = [random.randrange(3, 300) for _ in range(num_prompt)]
    return GenerationRequest(
        prompt,
        Choice(adapter),
        adapter or "base",
        SamplingConfig(max_new_tokens=num_new),
        tenant=tenant,
        ignore_end=True,
        scores_prompt=echo,
        num_logprobs=1 if echo else None,
    )


KINDS: dict[str, Make] = {
    "short": lambda tenant: make_request(tenant, 4, 12),
    "long answers": lambda tenant: make_request(tenant, 4, 60),
    "long prompts": lambda tenant: make_request(tenant, 100, 1),
    "scored prompts": lambda tenant: make_request(tenant, 80, 1, echo=True),
    "many adapters": lambda tenant: make_request(tenant, 20, 8, random.choice([*METHODS])),
}


class CountingRunner:
    """Computes nothing, and counts for whom."""

    def __init__(self):
        self.computed: Counter[str] = Counter()
        self.prefixes = PrefixCache()
        self.rows: list[Row] = []

    @property
    def session(self) -> Any:
        return SimpleNamespace(logits=torch.zeros(len(self.rows), 300)) if self.rows else None

    def read(self, row: Row, max_tokens: int) -> None:
        num_tokens = min(max_tokens, row.length - row.num_read)
        row.num_read += num_tokens
        self.computed[row.share.tenant] += num_tokens

    def decode(self, record: object) -> None:
        self.computed.update(row.share.tenant for row in self.rows)

    def join(self, row: Row) -> None:
        self.rows.append(row)

    def leave(self, leaving: Collection[Row]) -> None:
        self.rows = [row for row in self.rows if row not in leaving]

    def remember(self, row: Row) -> None:
        pass

    def bound_prepared(self, served: object) -> None:
        pass


class Load:
    """An engine, and customers who keep requests in its queue."""

    def __init__(self, host, tokenizer, **limits: Any):
        settings = {"max_rows": 4, "cache_tokens": 4096, "prefill_tokens": 32}
        self.engine = Engine(host, tokenizer, EngineLimits(**settings | limits))
        self.runner = CountingRunner()
        self.engine._runner = self.runner
        self._wants: dict[str, tuple[Make, int]] = {}
        self._under_way: Counter[str] = Counter()

    def want(self, tenant: str, make: Make, num_requests: int = 8) -> None:
        self._wants[tenant] = make, num_requests

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            for tenant, (make, num_requests) in self._wants.items():
                while self._under_way[tenant] < num_requests:
                    self._submit(make(tenant))
            self.engine.step()

    def rest(self) -> None:
        self._wants.clear()
        while self.engine.step():
            pass

    def _submit(self, request: GenerationRequest) -> None:
        self._under_way[request.tenant] += 1

        def end() -> None:
            self._under_way[request.tenant] -= 1

        self.engine.submit(request, lambda event: None, end)

    def share(self, tenant: str) -> float:
        return self.runner.computed[tenant] / self.runner.computed.total()


@pytest.mark.parametrize(
    ("before", "first", "second"),
    [
        ("nothing", "long answers", "short"),
        ("idle after it", "long answers", "short"),
        *product(["alone for long"], KINDS, ["short", "long answers", "long prompts"]),
    ],
)
def test_two_who_always_want_more_get_as_much(host, tiny_tokenizer, before, first, second):
    random.seed(0)
    load = Load(host, tiny_tokenizer)
    if before != "nothing":
        load.want("first", KINDS[first])
        load.run(300)
    if before == "idle after it":
        load.rest()
    load.runner.computed.clear()
    load.want("first", KINDS[first])
    load.want("second", KINDS[second])
    load.run(500)
    assert load.share("second") == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_loads_of_all_kinds_get_as_much_in_little_room(host, tiny_tokenizer, seed):
    """With a cache in which rows drive one another out, however many requests each has."""
    random.seed(seed)
    load = Load(host, tiny_tokenizer, cache_tokens=300, max_rows=random.randrange(2, 9))

    def make(tenant: str) -> GenerationRequest:
        return random.choice([*KINDS.values()])(tenant)

    for tenant in ("first", "second"):
        load.want(tenant, make, random.randrange(10, 40))
    load.run(800)
    assert load.engine.counts["preemptions",] > 0
    assert load.share("second") == pytest.approx(0.5, rel=0.1)


def test_a_key_that_reads_long_prompts_leaves_time_to_those_who_write(host, tiny_tokenizer):
    load = Load(host, tiny_tokenizer, max_rows=32, prefill_tokens=256)
    for number in range(8):
        load.want(f"honest {number}", KINDS["short"], 1)
    load.want("greedy", KINDS["long prompts"], 16)
    load.run(50)
    load.runner.computed.clear()
    load.run(400)
    assert load.runner.computed["greedy"] / 400 <= READ_PER_TOKEN
    assert min(load.runner.computed.values()) > 0.6 * 400
