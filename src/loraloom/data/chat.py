"""Conversations in a chat template; what the assistant says is learnt, as it would be generated.

A model is asked for an answer with all turns before it, and the template's beginning of one. Each
answer is learnt after just that text. A template may write an answer differently once more turns
follow (reasoning is left out, say): such a conversation is learnt in several texts, each with the
answers that would be generated as they stand there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from loraloom.data.chat_template import ChatTemplate, Span
from loraloom.data.encoding import EncodedRow, LearntTokens, encode_each, fit
from loraloom.data.messages import Conversation, read_conversation
from loraloom.data.rows import Row
from loraloom.data.tokenising import count_shared, leading_tokens
from loraloom.errors import DataError, shown

_END_OF_REASONING = "</think>"
"""What ends the reasoning where it stands in the content."""


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    rows: Sequence[Row],
    columns: Mapping[str, str],
    max_length: int,
) -> list[EncodedRow]:
    """Conversations with a loss on what the assistant says, its end-of-turn token included.

    Where the template marks these tokens with `{% generation %}`, its marks are taken. Else they
    are what would be generated after the turns before.

    A row that has no answer, can't be put into the template or has something that the template
    leaves out has its fault.
    """
    start = leading_tokens(tokenizer)

    def read(row: Row) -> EncodedRow:
        texts = learn_answers(tokenizer, template, row, read_conversation(row, columns))
        fitted = [fit(text.ids, text.is_learnt, start, max_length) for text in texts]
        pieces = tuple(piece for text in fitted for piece in text.pieces)
        is_cut = any(text.is_cut or not text.pieces for text in fitted)
        return EncodedRow(pieces, is_cut=is_cut and bool(pieces))

    return encode_each(rows, read, list)


def learn_answers(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    row: Row,
    conversation: Conversation,
    first: int = 0,
) -> list[LearntTokens]:
    """A conversation in full length: loss on the assistant's turns from message `first` on."""
    places = [
        place
        for place, message in enumerate(conversation.messages)
        if message["role"] == "assistant" and place >= first
    ]
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
    return [_learn_spans(tokenizer, text, spans) for text, spans in texts]


Marked = tuple[str, list[Span]]
"""A text and where in it the answers are."""


def _marked_text(
    template: ChatTemplate, row: Row, conversation: Conversation, first: int
) -> Marked:
    text, marks = template.render_with_marks(conversation)
    start = 0
    if first:
        given = template.render(_until(conversation, first))
        start = count_shared(text, given)
    spans = [(begin, end) for begin, end in marks if begin >= start]
    if not any(end > begin for begin, end in spans):
        row.reject(
            "the chat template's {% generation %} marks have nothing of it between them; give "
            "chat_template another one"
        )
    return text, spans


@dataclass(frozen=True)
class _Answer:
    """An assistant's turn: the text that asks for it, and the text with it at the end."""

    asked: str
    answered: str

    def span_in(self, text: str, closing: str) -> Span | None:
        """Where the turn stands in a text as it would be generated; None if it does not."""
        for answered in (self.answered, self.answered.removesuffix(closing)):
            if text.startswith(answered):
                return len(self.asked), len(answered)
        return None


def _answered_texts(
    template: ChatTemplate, row: Row, conversation: Conversation, places: Sequence[int]
) -> list[Marked]:
    """As few texts as have every answer as it would be generated."""
    answers = [_read_answer(template, row, conversation, place) for place in places]
    closing = _closing(template)
    texts: list[Marked] = []
    while answers:
        text = answers[-1].answered
        spans = [answer.span_in(text, closing) for answer in answers]
        texts.append((text, [span for span in spans if span is not None]))
        answers = [answer for answer, span in zip(answers, spans, strict=True) if span is None]
    return texts[::-1]


def _read_answer(
    template: ChatTemplate, row: Row, conversation: Conversation, place: int
) -> _Answer:
    asked = template.render(_until(conversation, place), for_answer=True)
    answered = template.render(_until(conversation, place + 1))
    if not answered.startswith(asked):
        _reject_beginning(row, place, asked, answered)
    return _Answer(asked, answered)


def _reject_beginning(row: Row, place: int, asked: str, answered: str) -> NoReturn:
    shared = count_shared(asked, answered)
    row.reject(
        f"the chat template asks for message {place + 1} with {shown(asked[shared:])} where it "
        f"then writes {shown(answered[shared : shared + 30])}, so the model would learn another "
        "text than it is asked for; give chat_template: trl, or a template without this difference"
    )


def _learn_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]
) -> LearntTokens:
    """The tokens of a text; those that reach into a span are learnt."""
    if not tokenizer.is_fast:
        raise DataError(
            "chats need a fast tokenizer, which tells where its tokens stand in a text, got "
            f"{type(tokenizer).__name__}"
        )
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    is_learnt = [
        any(begin < end and token_begin < end and token_end > begin for begin, end in spans)
        for token_begin, token_end in encoding["offset_mapping"]
    ]
    return LearntTokens(encoding["input_ids"], is_learnt)


def _closing(template: ChatTemplate) -> str:
    """The end-of-text token, if the template puts it after a conversation that only asks."""
    end = template.end_of_text
    question = Conversation([{"role": "user", "content": "?"}])
    try:
        return end if template.render(question).endswith(end) else ""
    except TemplateError:
        return ""


def _check_written(
    template: ChatTemplate, row: Row, conversation: Conversation, places: Sequence[int]
) -> None:
    """Refuse what the template would leave out without a word."""
    for what, whole, without in _omissions(conversation, places):
        if _is_written_alike(template, whole, without):
            row.reject(
                f"the chat template leaves out {what}; give chat_template one that writes it, or "
                "leave it out of the data"
            )


def _omissions(
    conversation: Conversation, places: Sequence[int]
) -> Iterator[tuple[str, Conversation, Conversation]]:
    """What a template may not know, a conversation with it and one without."""
    if conversation.tools:
        yield "the tools", conversation, replace(conversation, tools=None)
    for place, message in enumerate(conversation.messages):
        name = f"of message {place + 1}"
        if "tool_calls" in message:
            without = _changed(conversation, place, tool_calls=[])
            yield f"the tool_calls {name}", conversation, without
            if message["content"].strip():
                answer = _until(conversation, place + 1)
                without = _changed(answer, place, content=f"{message['content']}?")
                yield f"the content {name}, beside its tool_calls", answer, without
        elif message["role"] not in ("user", "assistant"):
            without = _changed(conversation, place, content=f"{message['content']}?")
            yield f"the content {name}, of role {message['role']!r}", conversation, without
    for place in places:  # the reasoning of earlier turns is left out for good reasons
        answer, turn = _until(conversation, place + 1), conversation.messages[place]
        if "reasoning_content" in turn:
            without = _changed(answer, place, reasoning_content="")
            yield f"the reasoning of message {place + 1}", answer, without
        elif _END_OF_REASONING in turn["content"]:
            said = turn["content"].rpartition(_END_OF_REASONING)[2]
            yield (
                f"the reasoning of message {place + 1}",
                answer,
                _changed(answer, place, content=said),
            )


def _until(conversation: Conversation, place: int) -> Conversation:
    return replace(conversation, messages=conversation.messages[:place])


def _changed(conversation: Conversation, place: int, **fields: object) -> Conversation:
    messages = list(conversation.messages)
    messages[place] = {**messages[place], **fields}
    return replace(conversation, messages=messages)


def _is_written_alike(template: ChatTemplate, one: Conversation, other: Conversation) -> bool:
    try:
        return template.render(one) == template.render(other)
    except TemplateError:
        return False
