"""Conversations in a chat template; what the assistant says is learnt, as it would be generated.

A model is asked for an answer with all turns before it, and the template's beginning of one. Each
answer is learnt after just that text. A template may write an answer differently once more turns
follow (reasoning is left out, say): such a conversation is learnt in several texts, each with the
answers that would be generated as they are written there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from loraloom.data.messages import Conversation
from loraloom.data.sources import Row
from loraloom.data.templates import read_template, template_errors
from loraloom.data.tokens import NO_LOSS, Example, count_shared
from loraloom.errors import DataError, shown

TRAINING_DAY = date(2024, 7, 26)
"""Today, for templates in training, as in Llama 3.2's by default: the same rows are the same tokens
tomorrow, and the same ones are held out."""

TRL = "trl"
"""In place of a template: the one that trl has for training with the tokenizer's."""

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")

Marked = tuple[str, list[tuple[int, int]]]
"""A text, and where in it the answers begin and end, in characters."""


class ChatTemplate:
    """A tokenizer's chat template, or a text in its place. It renders as `apply_chat_template`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, source: str | None = None, day: date | None = None
    ):
        self._tokenizer, self._given = tokenizer, source
        self._fields = {**tokenizer.special_tokens_map, "documents": None}
        if day is not None:  # apply_chat_template takes plain data alone, and so no other clock
            self._fields["strftime_now"] = day.strftime
        self._compile(None)

    def source(self, tools: list[dict[str, Any]] | None = None) -> str:
        """The template's text; a tokenizer may have another one for tools."""
        try:
            return self._tokenizer.get_chat_template(self._given, tools)
        except ValueError as error:
            raise DataError(
                "the tokenizer must have a chat template for messages, and one by default; give "
                "one as chat_template, or write the conversations out as texts"
            ) from error

    def marks_answers(self, conversation: Conversation) -> bool:
        """Whether the template marks the assistant's part itself, by `{% generation %}`."""
        return bool(_GENERATION_TAG.search(self.source(conversation.tools)))

    def render(self, conversation: Conversation, *, for_answer: bool = False) -> str:
        """The text of a conversation; `for_answer` ends it where the model's answer begins."""
        return self.render_with_marks(conversation, for_answer=for_answer)[0]

    def render_with_marks(self, conversation: Conversation, *, for_answer: bool = False) -> Marked:
        """The text of a conversation, and where the template marks the assistant's parts in it."""
        template = self._compile(conversation.tools)
        blocks: list[str] = []
        marks: list[tuple[int, int]] = []
        fields = {
            **self._fields,
            "messages": [
                # gpt-oss's template calls the reasoning `thinking`
                {"thinking": message["reasoning_content"], **message}
                if "reasoning_content" in message
                else message
                for message in conversation.messages
            ],
            "tools": conversation.tools,
            "add_generation_prompt": for_answer,
        }
        with template_errors(), template.environment.activate_tracker(blocks, marks):
            for block in template.generate(fields):
                blocks.append(block)
            text = "".join(blocks)
            text.encode()  # half of a surrogate pair, which no tokenizer reads, fails here
        return text, marks

    def closing(self) -> str:
        """The end-of-text token, if the template puts it after a conversation that only asks."""
        end = str(self._fields.get("eos_token", ""))
        try:
            question = self.render(Conversation([{"role": "user", "content": "?"}]))
        except TemplateError:
            return ""
        return end if question.endswith(end) else ""

    def _compile(self, tools: list[dict[str, Any]] | None) -> Any:
        source = self.source(tools)
        try:
            with template_errors():  # transformers keeps compiled ones
                return chat_template_utils._compile_jinja_template(source)
        except TemplateError as error:
            raise DataError(f"the chat template is not valid Jinja: {error}; mend it") from error


def load_chat_template(
    tokenizer: PreTrainedTokenizerBase, given: str | None = None, day: date | None = None
) -> ChatTemplate:
    """The chat template of a tokenizer, or one in its place; see `given_source`."""
    source = None if given is None else given_source(tokenizer, given)
    return ChatTemplate(tokenizer, source, day)


def given_source(tokenizer: PreTrainedTokenizerBase, given: str) -> str:
    """The text of a template that is given as such, as a file, or as `trl`."""
    if given != TRL:
        return template_text(given)
    own = ChatTemplate(tokenizer).source()
    try:
        from trl.chat_template_utils import get_training_chat_template

        return get_training_chat_template(tokenizer) or own
    except ImportError as error:
        raise DataError(
            f"chat_template {TRL} needs trl's templates: pip install trl ({error})"
        ) from error
    except ValueError as error:
        raise DataError(
            f"trl has no training template for this tokenizer; give chat_template another one "
            f"({str(error).splitlines()[0]})"
        ) from error


def template_text(given: str) -> str:
    """The text of a template that is given as such or as a file; `trl` as it is."""
    return given if given == TRL else read_template(given, "chat_template", (TRL,))


def learn_answers(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    row: Row,
    conversation: Conversation,
    first: int = 0,
) -> list[Example]:
    """A conversation in full length: loss on the assistant's turns from message `first` on.

    Where the template marks these tokens with `{% generation %}`, its marks are taken. Else they
    are what would be generated after the turns before, the end-of-turn token included.
    """
    roles = [message["role"] for message in conversation.messages]
    places = [place for place, role in enumerate(roles) if role == "assistant" and place >= first]
    if not places:
        row.reject(
            "the conversation has no assistant's turn to learn from; add one, or remove the row"
        )
    if places[0] == 0:
        row.reject(
            "a conversation must not begin with the assistant's turn; put a user's before it"
        )
    try:
        _check_written(template, row, conversation, places)
        if template.marks_answers(conversation):
            texts = [_marked_text(template, row, conversation, first)]
        else:
            texts = _answered_texts(template, row, conversation, places)
    except TemplateError as error:
        row.reject(
            f"the conversation does not fit the chat template: {error}; change the conversation, "
            "or give chat_template another one"
        )
    return [_learn_spans(tokenizer, *text) for text in texts]


def _marked_text(
    template: ChatTemplate, row: Row, conversation: Conversation, first: int
) -> Marked:
    text, marks = template.render_with_marks(conversation)
    start = count_shared(text, template.render(_until(conversation, first))) if first else 0
    spans = [(begin, end) for begin, end in marks if begin >= start]
    if not any(end > begin for begin, end in spans):
        row.reject(
            "the chat template's {% generation %} marks have nothing of it between them; give "
            "chat_template another one"
        )
    return text, spans


def _answered_texts(
    template: ChatTemplate, row: Row, conversation: Conversation, places: Sequence[int]
) -> list[Marked]:
    """As few texts as have every answer as it would be generated."""
    answers = [_read_answer(template, row, conversation, place) for place in places]
    closing = template.closing()
    texts: list[Marked] = []
    while answers:
        text, spans, others = answers[-1][1], [], []
        for asked, answered in answers:
            ends = (answered, answered.removesuffix(closing))
            end = next((len(end) for end in ends if text.startswith(end)), None)
            if end is None:
                others.append((asked, answered))
            else:
                spans.append((len(asked), end))
        texts.append((text, spans))
        answers = others
    return texts[::-1]


def _read_answer(
    template: ChatTemplate, row: Row, conversation: Conversation, place: int
) -> tuple[str, str]:
    """The text that asks for an assistant's turn, and the text with the turn at its end."""
    asked = template.render(_until(conversation, place), for_answer=True)
    answered = template.render(_until(conversation, place + 1))
    if not answered.startswith(asked):
        shared = count_shared(asked, answered)
        row.reject(
            f"the chat template asks for message {place + 1} with {shown(asked[shared:])} where it "
            f"then writes {shown(answered[shared : shared + 30])}, so the model would learn "
            "another text than it is asked for; give chat_template: trl, or a template without "
            "this difference"
        )
    return asked, answered


def _learn_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[tuple[int, int]]
) -> Example:
    """The tokens of a text; those that reach into a span are learnt."""
    if not tokenizer.is_fast:
        raise DataError(
            "chats need a fast tokenizer, which knows where its tokens begin in a text, got "
            f"{type(tokenizer).__name__}"
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    labels = [
        token if any(b < e and begin < e and end > b for b, e in spans) else NO_LOSS
        for token, (begin, end) in zip(
            encoding["input_ids"], encoding["offset_mapping"], strict=True
        )
    ]
    return Example(tuple(encoding["input_ids"]), tuple(labels))


def _check_written(
    template: ChatTemplate, row: Row, conversation: Conversation, places: Sequence[int]
) -> None:
    """Refuse what the template would leave out without a word."""
    for what, one, other in _omissions(conversation, places):
        try:
            is_left_out = template.render(one) == template.render(other)
        except TemplateError:
            continue
        if is_left_out:
            row.reject(
                f"the chat template leaves out {what}; give chat_template one that writes it, or "
                "leave it out of the data"
            )


def _omissions(
    conversation: Conversation, places: Sequence[int]
) -> Iterator[tuple[str, Conversation, Conversation]]:
    """What a template may leave out, a conversation with it and one without."""
    if conversation.tools:
        yield "the tools", conversation, conversation._replace(tools=None)
    for place, message in enumerate(conversation.messages):
        name, content = f"of message {place + 1}", message["content"]
        # templates leave out earlier turns' reasoning, and what is said beside calls, on purpose
        last = _until(conversation, place + 1)
        if "tool_calls" in message:
            yield f"the tool_calls {name}", *_changed(conversation, place, tool_calls=[])
            if content.strip():
                changed = _changed(last, place, content=f"{content}?")
                yield f"the content {name}, beside its tool_calls", *changed
        elif message["role"] not in ("user", "assistant"):
            changed = _changed(conversation, place, content=f"{content}?")
            yield f"the content {name}, of role {message['role']!r}", *changed
        if place in places and "reasoning_content" in message:
            yield f"the reasoning {name}", *_changed(last, place, reasoning_content="")
        elif place in places and "</think>" in content:
            said = content.rpartition("</think>")[2]
            yield f"the reasoning {name}", *_changed(last, place, content=said)


def _until(conversation: Conversation, place: int) -> Conversation:
    return conversation._replace(messages=conversation.messages[:place])


def _changed(
    conversation: Conversation, place: int, **fields: object
) -> tuple[Conversation, Conversation]:
    """A conversation, and the same with another message."""
    messages = list(conversation.messages)
    messages[place] = {**messages[place], **fields}
    return conversation, conversation._replace(messages=messages)
