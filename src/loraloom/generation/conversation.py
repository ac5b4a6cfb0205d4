"""A conversation with one model, or with several side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from loraloom.data.messages import Message
from loraloom.generation.engine import Engine
from loraloom.generation.prompts import EncodedPrompt, Prompt, encode_prompt, form_for
from loraloom.generation.sampling import SamplingConfig
from loraloom.generation.sequence import Event, Failure, GenerationRequest


@dataclass
class Turn:
    """What the user said, and what each model answered."""

    said: str
    answers: dict[str, str] = field(default_factory=dict)

    def answer_for(self, model: str) -> str:
        """A model's own answer, or else that of the model that was asked."""
        return self.answers.get(model) or next(iter(self.answers.values()), "")


class Conversation:
    """Turns of a user and of models, one of which is the base model.

    A model that joins later reads the answers of those that were asked before.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        base_name: str = "base",
        system: str | None = None,
        *,
        raw: bool = False,
    ):
        self.turns: list[Turn] = []
        self._engine = engine
        self._tokenizer = tokenizer
        self._base_name = base_name
        self._system = system
        self._raw = raw

    def ask(
        self, text: str, models: Sequence[str], sampling: SamplingConfig
    ) -> Iterator[tuple[str, str]]:
        """Say something to models, and give their answers in pieces, one model after the other.

        They answer together; the pieces of the later ones are kept until it is their turn. An
        answer whose reader stops early is remembered as far as it was read.
        """
        turn = Turn(text)
        prompts = {model: self._encode(model, turn) for model in models}
        events: dict[str, deque[Event]] = {model: deque() for model in models}
        rows = []
        try:
            for model in models:
                request = self._request(model, prompts[model], sampling)
                rows.append(self._engine.submit(request, events[model].append))
            self.turns.append(turn)
            for model in models:
                for piece in self._pieces(events[model]):
                    turn.answers[model] = turn.answers.get(model, "") + piece
                    yield model, piece
        finally:
            for row in rows:
                self._engine.cancel(row)
            while self._engine.step():
                pass

    def _pieces(self, events: deque[Event]) -> Iterator[str]:
        """One model's pieces; does the engine's steps while there is none."""
        while True:
            while not events:
                self._engine.step()
            event = events.popleft()
            if isinstance(event, Failure):
                raise event.error
            yield event.text
            if event.finish_reason is not None:
                return

    def _request(
        self, model: str, prompt: EncodedPrompt, sampling: SamplingConfig
    ) -> GenerationRequest:
        room = max(1, self._engine.max_length - len(prompt.ids))
        shortened = min(sampling.max_new_tokens, room)
        return GenerationRequest(
            prompt.ids,
            None if model == self._base_name else model,
            model,
            sampling.model_copy(update={"max_new_tokens": shortened}),
            continues=prompt.continues,
        )

    def _encode(self, model: str, turn: Turn) -> EncodedPrompt:
        """What a model reads: all turns, or the last one alone where its prompts have no turns."""
        form = form_for(self._engine.host, None if model == self._base_name else model)
        has_turns = self._tokenizer.chat_template if form is None else not form.is_text
        if self._raw or not has_turns:
            return encode_prompt(self._tokenizer, Prompt(turn.said), form, raw=self._raw)
        messages: list[Message] = []
        if self._system is not None:
            messages.append({"role": "system", "content": self._system})
        for former in self.turns:
            messages.append({"role": "user", "content": former.said})
            messages.append({"role": "assistant", "content": former.answer_for(model)})
        messages.append({"role": "user", "content": turn.said})
        return encode_prompt(self._tokenizer, Prompt(tuple(messages)), form)
