from __future__ import annotations

import pytest

from loraloom.data.chat import encode_conversations
from loraloom.data.encoding import DROPPED
from loraloom.data.examples import NO_LOSS
from loraloom.data.rows import Row
from loraloom.errors import DataError

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}\n{% endfor %}"
)
FORGETFUL = (  # writes an answer in full only where it is the last turn, as reasoning templates do
    "{% for m in messages %}[{{ m.role }}]{% if loop.last %}{{ m.content }}{% endif %}<eos>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def conversation(*turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    return Row({"messages": messages}, "chat.jsonl, line 3")


TWO_TURNS = conversation(
    ("user", "color?"), ("assistant", "blue"), ("user", "true?"), ("assistant", "yes")
)


def encode(tokenizer, template, *rows, max_length=64):
    tokenizer.chat_template = template
    return encode_conversations(tokenizer, rows, "messages", max_length)


def spans(tokenizer, piece):
    """The text of each run of tokens that has a loss."""
    runs, current = [], []
    for label in [*piece.labels, NO_LOSS]:
        if label != NO_LOSS:
            current.append(label)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def test_loss_is_on_the_assistant_turns_only(tiny_tokenizer):
    (row,) = encode(tiny_tokenizer, PLAIN, TWO_TURNS)
    assert spans(tiny_tokenizer, row.pieces[0]) == ["blue<eos>\n", "yes<eos>\n"]
    assert tiny_tokenizer.decode(row.pieces[0].input_ids).startswith("[user]color?<eos>\n[assist")


def test_the_templates_own_marks_are_taken(tiny_tokenizer):
    (row,) = encode(tiny_tokenizer, MARKED, TWO_TURNS)
    assert spans(tiny_tokenizer, row.pieces[0]) == ["blue<eos>", "yes<eos>"]


def test_turns_after_the_last_answer_are_left_out(tiny_tokenizer):
    asked = conversation(("user", "color?"), ("assistant", "blue"), ("user", "true?"))
    (row,) = encode(tiny_tokenizer, PLAIN, asked)
    assert tiny_tokenizer.decode(row.pieces[0].input_ids).endswith("[assistant]blue<eos>\n")


def test_a_conversation_without_an_answer_is_dropped(tiny_tokenizer):
    assert encode(tiny_tokenizer, PLAIN, conversation(("user", "color?"))) == [DROPPED]


def test_a_long_conversation_keeps_its_last_answer(tiny_tokenizer):
    (whole,) = encode(tiny_tokenizer, PLAIN, TWO_TURNS)
    (cut,) = encode(tiny_tokenizer, PLAIN, TWO_TURNS, max_length=12)
    assert cut.is_cut
    assert cut.pieces[0].input_ids == whole.pieces[0].input_ids[-12:]
    assert spans(tiny_tokenizer, cut.pieces[0]) == ["yes<eos>\n"]


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_tokenizer):
    with pytest.raises(DataError, match=r"chat.jsonl, line 3: the chat template writes earlier"):
        encode(tiny_tokenizer, FORGETFUL, TWO_TURNS)


def test_such_a_template_serves_conversations_of_one_answer(tiny_tokenizer):
    template = FORGETFUL.replace("loop.last", "true")
    (row,) = encode(tiny_tokenizer, template, TWO_TURNS)
    assert spans(tiny_tokenizer, row.pieces[0]) == ["blue<eos>", "yes<eos>"]


def test_a_conversation_must_not_begin_with_the_assistant(tiny_tokenizer):
    with pytest.raises(DataError, match="line 3: a conversation must not begin with the assist"):
        encode(tiny_tokenizer, PLAIN, conversation(("assistant", "blue")))


def test_a_template_that_refuses_a_conversation_names_the_row(tiny_tokenizer):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"line 3: .* chat template: roles must alternate"):
        encode(tiny_tokenizer, template, TWO_TURNS)


def test_a_tokenizer_without_a_chat_template_is_refused(tiny_tokenizer):
    with pytest.raises(DataError, match="the tokenizer must have a chat template"):
        encode(tiny_tokenizer, None, TWO_TURNS)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "line 3: field 'messages' must be a list of messages, got str"),
        ([], "line 3: field 'messages' must be a list of messages"),
        (["hello"], "line 3: message 1 must be an object, got str"),
        ([{"role": "user"}], "line 3, message 1: the row has no field 'content'"),
        ([{"role": "user", "content": 1}], "line 3, message 1: field 'content' must be a string"),
    ],
)
def test_messages_of_another_form_are_refused(tiny_tokenizer, messages, message):
    with pytest.raises(DataError, match=message):
        encode(tiny_tokenizer, PLAIN, Row({"messages": messages}, "chat.jsonl, line 3"))
