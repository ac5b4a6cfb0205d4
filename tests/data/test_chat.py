from __future__ import annotations

import sys

import pytest

from loraloom.data.chat import TRAINING_DAY, load_chat_template
from loraloom.data.messages import Conversation, read_conversation, read_messages
from loraloom.data.sources import Row
from loraloom.data.tokens import DROPPED, NO_LOSS
from loraloom.errors import DataError
from tests.data.encoded import encode as encode_rows

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<eos>{% endgeneration %}{% else %}{{ m.content }}<eos>{% endif %}\n{% endfor %}"
)
FORGETFUL = (  # writes an answer in full only where it is the last turn, as reasoning templates do
    "{% for m in messages %}[{{ m.role }}]{% if loop.last or m.role == 'user' %}{{ m.content }}"
    "{% endif %}<eos>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


USER = {"role": "user", "content": "color?"}
BAD_CALL = {"function": {"name": "f", "arguments": "[1]"}}


def conversation(*turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    return Row({"messages": messages}, "chat.jsonl, line 3")


TWO_TURNS = conversation(
    ("user", "color?"), ("assistant", "blue"), ("user", "true?"), ("assistant", "yes")
)


def encode(tokenizer, template, *rows, max_length=64):
    tokenizer.chat_template = template
    return encode_rows(tokenizer, rows, max_length, format="chat")


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


def test_a_conversation_without_an_answer_is_refused(tiny_tokenizer):
    with pytest.raises(DataError, match="line 3: the conversation has no assistant's turn"):
        encode(tiny_tokenizer, PLAIN, conversation(("user", "color?")))


def test_an_answer_that_does_not_fit_is_dropped(tiny_tokenizer):
    assert encode(tiny_tokenizer, PLAIN, TWO_TURNS, max_length=3) == [DROPPED]


def test_a_long_conversation_keeps_its_last_answer(tiny_tokenizer):
    (whole,) = encode(tiny_tokenizer, PLAIN, TWO_TURNS)
    (cut,) = encode(tiny_tokenizer, PLAIN, TWO_TURNS, max_length=12)
    assert cut.is_cut
    assert cut.pieces[0].input_ids == whole.pieces[0].input_ids[-12:]
    assert spans(tiny_tokenizer, cut.pieces[0]) == ["yes<eos>\n"]


def test_a_template_that_rewrites_earlier_turns_gives_a_text_for_each_answer(tiny_tokenizer):
    (row,) = encode(tiny_tokenizer, FORGETFUL, TWO_TURNS)
    assert [spans(tiny_tokenizer, piece) for piece in row.pieces] == [["blue<eos>"], ["yes<eos>"]]
    texts = [tiny_tokenizer.decode(piece.input_ids) for piece in row.pieces]
    assert texts == [
        "[user]color?<eos>[assistant]blue<eos>",
        "[user]color?<eos>[assistant]<eos>[user]true?<eos>[assistant]yes<eos>",
    ]


def test_a_template_that_asks_otherwise_than_it_writes_is_refused(tiny_tokenizer):
    template = PLAIN.replace("[assistant]{% endif", "[assistant]<think>{% endif")
    message = r"line 3: the chat template asks for message 2 with '<think>' where it then writes 'b"
    with pytest.raises(DataError, match=message):
        encode(tiny_tokenizer, template, TWO_TURNS)


def test_marks_that_cover_nothing_are_refused(tiny_tokenizer):
    template = MARKED.replace("m.role == 'assistant'", "false")
    with pytest.raises(DataError, match=r"line 3: .* marks have nothing of it between them"):
        encode(tiny_tokenizer, template, TWO_TURNS)


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
        ([{"role": "user"}], "line 3: message 1: the row has no field 'content'"),
        ([{"role": "user", "content": 1}], "line 3: message 1: field 'content' must be a string"),
        (
            [{"role": "usr", "content": ""}],
            r"message 1: role must be one of .* did you mean 'user'",
        ),
        ([USER, {"role": "assistant", "content": " "}], "message 2: the assistant's turn is empty"),
        ([USER, {"role": "assistant", "content": None}], "message 2: the row has no field 'cont"),
        ([{**USER, "text": "x"}], "message 1: a message of role 'user' has the unknown key 'text'"),
        ([{**USER, "tool_calls": [{}]}], "the unknown key 'tool_calls'; it may have role, conten"),
        ([{"role": "assistant", "tool_calls": [{}]}], "must be a list of calls of a function with"),
        ([{"role": "assistant", "tool_calls": [BAD_CALL]}], "arguments of a tool call must be an"),
        ([{**USER, "content": [{"type": "image"}]}], "'content' must be a text or a list of texts"),
        ([{"from": "robot", "value": "x"}], "message 1: 'from' must be one of human, user, gpt"),
        ([{"from": "gpt", "value": "x", "wieght": 1}], "a turn with 'from' has the unknown key"),
    ],
)
def test_messages_of_another_form_are_refused(tiny_tokenizer, messages, message):
    with pytest.raises(DataError, match=message):
        encode(tiny_tokenizer, PLAIN, Row({"messages": messages}, "chat.jsonl, line 3"))


def test_turns_of_sharegpt_become_messages():
    turns = [
        {"from": "human", "value": "color?", "weight": None},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "7"},
        {"from": "gpt", "value": "blue"},
    ]
    row = {"conversations": turns, "system": "Be brief.", "tools": '[{"name": "f"}]'}
    read = read_conversation(Row(row, "row"))
    called = {"name": "f", "arguments": {"a": 1}}
    assert read.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "color?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": called}],
        },
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "blue"},
    ]
    assert read.tools == [{"name": "f"}]


def test_a_system_prompt_stands_in_one_place():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    read = read_conversation(Row({"messages": turns, "system": "Be brief."}, "row"))
    assert read.messages == turns
    with pytest.raises(DataError, match="a system message must stand in field 'system' or in"):
        read_conversation(Row({"messages": turns, "system": "Be long."}, "row"))
    with pytest.raises(DataError, match="field 'system' must be a string"):
        read_conversation(Row({"messages": turns, "system": ["Be brief."]}, "row"))


def test_an_empty_reasoning_hides_none():
    turn = {"role": "assistant", "content": "x", "reasoning_content": "", "reasoning": "hm"}
    (message,) = read_messages(Row({"messages": [turn]}, "row"), "messages")
    assert message["reasoning_content"] == "hm"


CALLS_ALONE = (
    "{% for m in messages %}{{ m.role }}: {% if m.tool_calls %}"
    "{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_what_a_template_leaves_out_beside_a_call_is_refused(tiny_tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    turns = [{"role": "user", "content": "color?"}, call]
    assert encode(tiny_tokenizer, CALLS_ALONE, Row({"messages": turns}, "row"))
    call["content"] = "\n"
    assert encode(tiny_tokenizer, CALLS_ALONE, Row({"messages": turns}, "row"))
    call["content"] = "Let me look."
    with pytest.raises(DataError, match="leaves out the content of message 2, beside its tool_c"):
        encode(tiny_tokenizer, CALLS_ALONE, Row({"messages": turns}, "row"))


def test_the_day_of_a_template_does_not_change(tiny_tokenizer):
    source = "{{ strftime_now('%d %b %Y') }}"
    today = load_chat_template(tiny_tokenizer, source).render(Conversation([]))
    assert load_chat_template(tiny_tokenizer, source, TRAINING_DAY).render(Conversation([])) == (
        "26 Jul 2024"
    )
    assert today != "26 Jul 2024"


def test_a_template_may_leave_out_what_is_said_beside_an_earlier_call(tiny_tokenizer):
    template = CALLS_ALONE.replace(
        "{% if m.tool_calls %}", "{% if m.tool_calls %}{% if loop.last %}{{ m.content }}{% endif %}"
    )
    call = {"role": "assistant", "content": "Look.", "tool_calls": [{"function": {"name": "f"}}]}
    turns = [{"role": "user", "content": "color?"}, call, {"role": "tool", "content": "blue"}]
    turns += [{"role": "assistant", "content": "blue"}]
    assert encode(tiny_tokenizer, template, Row({"messages": turns}, "row"))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_goes_by_several_names(key):
    turn = {"role": "assistant", "content": None, key: "hm"}
    (message,) = read_messages(Row({"messages": [turn]}, "row"), "messages")
    assert message == {"role": "assistant", "content": "", "reasoning_content": "hm"}


def test_parts_of_a_content_are_joined():
    turn = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    assert read_messages(Row({"m": [turn]}, "row"), "m") == [{"role": "user", "content": "ab"}]


def test_nulls_in_the_schema_of_a_tool_are_left_out():
    tools = [{"function": {"name": "f", "parameters": {"a": {"type": "string"}, "b": None}}}]
    row = Row({"messages": [USER], "tools": tools}, "row")
    assert read_conversation(row).tools == [
        {"function": {"name": "f", "parameters": {"a": {"type": "string"}}}}
    ]


def test_a_template_takes_the_place_of_the_tokenizers(tiny_tokenizer, tmp_path):
    tiny_tokenizer.chat_template = "{{ raise_exception('not this one') }}"
    (tmp_path / "mine.jinja").write_text(PLAIN)
    for given in (PLAIN, str(tmp_path / "mine.jinja")):
        (row,) = encode_rows(tiny_tokenizer, [TWO_TURNS], 64, format="chat", chat_template=given)
        assert spans(tiny_tokenizer, row.pieces[0]) == ["blue<eos>\n", "yes<eos>\n"]


def test_trl_has_no_template_for_every_tokenizer(tiny_tokenizer):
    tiny_tokenizer.chat_template = PLAIN
    with pytest.raises(DataError, match="trl has no training template for this tokenizer"):
        load_chat_template(tiny_tokenizer, "trl")


def test_trl_may_be_missing(tiny_tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.chat_template_utils", None)
    tiny_tokenizer.chat_template = PLAIN
    with pytest.raises(DataError, match="chat_template trl needs trl's templates: pip install trl"):
        load_chat_template(tiny_tokenizer, "trl")


def test_a_tokenizer_that_can_not_tell_where_tokens_stand_is_refused(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(type(tiny_tokenizer), "is_fast", False)
    with pytest.raises(DataError, match="chats need a fast tokenizer"):
        encode(tiny_tokenizer, PLAIN, TWO_TURNS)
