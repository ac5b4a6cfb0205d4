import json
from itertools import groupby

import pytest

from loraloom.data.chat import read_conversation, read_messages
from loraloom.data.sources import Row
from loraloom.data.templates import TRAINING_DAY, ChatTemplate, Conversation
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
CALLS_ALONE = (
    "{% for m in messages %}{{ m.role }}: {% if m.tool_calls %}"
    "{{ m.tool_calls[0].function.name }}{% else %}{{ m.content }}{% endif %}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
USER = {"role": "user", "content": "color?"}
ANSWER = {"role": "assistant", "content": "blue"}
BAD_CALL = {"function": {"name": "f", "arguments": "[1]"}}


def conversation(*turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    return Row({"messages": messages}, "chat.jsonl, line 3")


ONE_TURN = (("user", "color?"), ("assistant", "blue"))
TWO_TURNS = conversation(*ONE_TURN, ("user", "true?"), ("assistant", "yes"))


def encode(tokenizer, template, *rows, max_length=64):
    tokenizer.chat_template = template
    return encode_rows(tokenizer, rows, max_length, format="chat")


def spans(tokenizer, piece):
    """The text of each run of tokens that has a loss."""
    runs = groupby(piece.labels, lambda label: label != NO_LOSS)
    return [tokenizer.decode(list(run)) for is_learnt, run in runs if is_learnt]


def test_a_long_conversation_keeps_its_last_answer_if_that_fits(tiny_tokenizer):
    (whole,) = encode(tiny_tokenizer, PLAIN, TWO_TURNS)
    (cut,) = encode(tiny_tokenizer, PLAIN, TWO_TURNS, max_length=12)
    assert cut.is_cut
    assert cut.pieces[0].input_ids == whole.pieces[0].input_ids[-12:]
    assert spans(tiny_tokenizer, cut.pieces[0]) == ["yes<eos>\n"]
    assert encode(tiny_tokenizer, PLAIN, TWO_TURNS, max_length=3) == [DROPPED]


@pytest.mark.parametrize(
    ("template", "row", "message"),
    [
        (PLAIN, conversation(("user", "color?")), "line 3: the conversation has no assistant"),
        (PLAIN, conversation(("assistant", "b")), "line 3: a conversation must not start with"),
        (
            PLAIN.replace("[assistant]{% endif", "[assistant]<think>{% endif"),
            TWO_TURNS,
            "line 3: the generation prompt for message 2 continues with '<think>', but the",
        ),
        (MARKED.replace("m.role == 'assistant'", "false"), TWO_TURNS, "3: .* marks do not enclose"),
        ("{{ raise_exception('no roles') }}", TWO_TURNS, "line 3: .* rejects the row: no roles"),
        (None, TWO_TURNS, "the tokenizer must have a chat template"),
    ],
)
def test_a_conversation_and_its_template_must_fit(tiny_tokenizer, template, row, message):
    with pytest.raises(DataError, match=message):
        encode(tiny_tokenizer, template, row)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "line 3: field 'messages' must be a list of messages"),
        ("hello", "line 3: field 'messages' must be a list of messages, got str"),
        (["hello"], "line 3: message 1 must be an object, got str"),
        ([{"role": "user"}], "line 3: message 1: the row has no field 'content'"),
        ([{"role": "usr", "content": ""}], r"message 1: role must be .* did you mean 'user'"),
        ([USER, {"role": "assistant", "content": " "}], "message 2: the assistant's turn is empty"),
        ([{**USER, "text": "x"}], "message 1: a message of role 'user' has the unknown key 'text'"),
        ([{**USER, "tool_calls": [{}]}], "the unknown key 'tool_calls'; it may have role, conten"),
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
    row = {"conversations": turns, "system": "Be brief.", "tools": '[{"name": "f", "a": null}]'}
    read = read_conversation(Row(row, "row"))
    called = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    assert read_conversation(Row(row | {"conversations": json.dumps(turns)}, "row")) == read
    assert read.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "color?"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
        {"role": "tool", "content": "7"},
        {"role": "assistant", "content": "blue"},
    ]
    assert read.tools == [{"name": "f"}]


def test_only_the_answers_of_a_completion_are_learned(tiny_tokenizer):
    prompt = [USER, {"role": "assistant", "content": "red"}, USER]
    turns = [{"role": "assistant", "content": "blue"}, USER, {"role": "assistant", "content": "b"}]
    row = {"prompt": prompt, "completion": turns}
    for template in (PLAIN, MARKED):
        (encoded,) = encode(tiny_tokenizer, template, Row(row, "row"))
        learned = spans(tiny_tokenizer, encoded.pieces[0])
        assert [text.strip() for text in learned] == ["blue<eos>", "b<eos>"]
    expected = read_conversation(Row(row, "row"))
    assert expected.num_prompt_messages == 3
    texts = {name: json.dumps(messages) for name, messages in row.items()}  # as CSV has them
    assert read_conversation(Row(texts, "row")) == expected
    named = Row({"messages": [USER], "asked": prompt, "said": turns}, "row")
    assert read_conversation(named, {"prompt": "asked", "completion": "said"}) == expected
    with_system = read_conversation(Row({**row, "system": "Be brief."}, "row"))
    assert with_system.num_prompt_messages == 4
    assert read_conversation(Row({**row, "messages": [USER]}, "row")).messages == [USER]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"completion": []}, "line 3: field 'completion' is empty, so there is nothing to learn"),
        ({"completion": "blue"}, "line 3: field 'completion' must be a list of messages, got str"),
        ({"completion": [USER]}, "line 3: the conversation has no assistant message to learn from"),
        ({"prompt": "color?"}, "line 3: field 'prompt' must be a list of messages, got str"),
        ({"chat_template_kwargs": [1]}, r"'chat_template_kwargs' must be an object, got \[1\]"),
        ({"chat_template_kwargs": {"tools": 1}}, "must not set tools; remove tools"),
    ],
)
def test_a_prompt_and_completion_of_another_form_are_refused(tiny_tokenizer, fields, message):
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], **fields}
    with pytest.raises(DataError, match=message):
        encode(tiny_tokenizer, PLAIN, Row(row, "chat.jsonl, line 3"))


def test_a_system_prompt_is_in_one_place():
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert read_conversation(Row({"messages": turns, "system": "Be brief."}, "r")).messages == turns
    with pytest.raises(DataError, match="a system message must be in field 'system' or in"):
        read_conversation(Row({"messages": turns, "system": "Be long."}, "row"))


@pytest.mark.parametrize(
    ("turn", "read"),
    [
        *(
            ({"role": "assistant", "content": None, key: "hm"}, {"reasoning_content": "hm"})
            for key in ("reasoning_content", "reasoning", "thinking")
        ),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, {"content": "ab"}),
    ],
)
def test_reasoning_and_content_have_one_form(turn, read):
    (message,) = read_messages(Row({"m": [turn]}, "row"), "m")
    assert message == {"role": turn["role"], "content": "", **read}


def test_what_a_template_leaves_out_beside_a_call_is_refused(tiny_tokenizer):
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    row = Row({"messages": [USER, call]}, "row")
    assert encode(tiny_tokenizer, CALLS_ALONE, row)
    call["content"] = "\n"
    assert encode(tiny_tokenizer, CALLS_ALONE, row)
    call["content"] = "Let me look."
    with pytest.raises(DataError, match="drops the content of message 2, next to its tool_c"):
        encode(tiny_tokenizer, CALLS_ALONE, row)
    answer = [{"role": "tool", "content": "b"}, {"role": "assistant", "content": "blue"}]
    forgets = CALLS_ALONE.replace(
        "{% if m.tool_calls %}", "{% if m.tool_calls %}{% if loop.last %}{{ m.content }}{% endif %}"
    )
    assert encode(tiny_tokenizer, forgets, Row({"messages": [USER, call, *answer]}, "row"))


def test_the_day_of_a_template_does_not_change_in_training(tiny_tokenizer):
    source = "{{ strftime_now('%d %b %Y') }}"
    fixed, today = (
        ChatTemplate(tiny_tokenizer, source, day).render(Conversation([]))
        for day in (TRAINING_DAY, None)
    )
    assert fixed == "26 Jul 2024" != today


def test_a_tokenizer_that_does_not_know_where_tokens_begin_is_refused(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(type(tiny_tokenizer), "is_fast", False)
    with pytest.raises(DataError, match="chat data requires a fast tokenizer"):
        encode(tiny_tokenizer, PLAIN, TWO_TURNS)
