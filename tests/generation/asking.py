"""Asking an engine without HTTP."""

from collections.abc import Iterable, Sequence
from typing import Any

from loraloom.generation.engine import Engine
from loraloom.generation.generate import complete
from loraloom.generation.request import Event, GenerationRequest, Piece
from loraloom.generation.sampling import SamplingConfig
from loraloom.host.choice import Choice
from loraloom.host.layout import RowAdapter

TEXTS = (
    "one",
    "Question: yes or no? Answer:",
    "the sky is blue, please choose the correct answer to the question: (A) one (B) two",
    "Please choose",
    "a short answer is",
)


class Asked:
    """A request and what came of it."""

    def __init__(self, request: GenerationRequest):
        self.request = request
        self.events: list[Event] = []
        self.row: Any = None

    @property
    def pieces(self) -> list[Piece]:
        return [event for event in self.events if isinstance(event, Piece)]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def error(self) -> Exception | None:
        last = self.events[-1]
        return last if isinstance(last, Exception) else None


def request(
    tokenizer: Any, text: str, adapter: RowAdapter = None, place: int = 0, **settings: Any
) -> GenerationRequest:
    """Make a request; settings of the sampling and of the request may be mixed."""
    own = {key: settings.pop(key) for key in list(settings) if key in SamplingConfig.model_fields}
    sampling = SamplingConfig(**{"max_new_tokens": 8} | own)
    ids = tokenizer(text)["input_ids"]
    owner = adapter[0] if isinstance(adapter, tuple) else adapter or "base"
    return GenerationRequest(ids, Choice(adapter), owner, sampling, place, **settings)


def submit(engine: Engine, *requests: GenerationRequest) -> list[Asked]:
    asked = [Asked(one) for one in requests]
    for one in asked:
        one.row = engine.submit(one.request, one.events.append)
    return asked


def finish(engine: Engine, max_steps: int = 2000) -> None:
    """Do steps until there is nothing to do."""
    for _ in range(max_steps):
        if not engine.step():
            return
    raise AssertionError("the engine does not end")


def answers(engine: Engine, requests: Iterable[GenerationRequest]) -> list[str]:
    asked = submit(engine, *requests)
    finish(engine)
    assert [one.error for one in asked] == [None] * len(asked)
    return [one.text for one in asked]


def alone(engine: Engine, tokenizer: Any, requests: Sequence[GenerationRequest]) -> list[str]:
    """What `loraloom.generate` makes of each request without company."""
    return [complete(engine.host, tokenizer, [one])[0].text for one in requests]
