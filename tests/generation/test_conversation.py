from __future__ import annotations

import pytest

from loraloom.generation.generate import Conversation, generate
from loraloom.generation.prompts import Prompt
from loraloom.generation.sampling import SamplingConfig
from loraloom.generation.sequence import RequestError

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
)
GREEDY = SamplingConfig(max_new_tokens=6)


@pytest.fixture
def conversation(make_engine, tiny_tokenizer):
    tiny_tokenizer.chat_template = TEMPLATE
    return Conversation(make_engine(), tiny_tokenizer)


def said(conversation, text, models, sampling=GREEDY):
    """The whole answers by model."""
    answers: dict[str, str] = {}
    for model, piece in conversation.ask(text, models, sampling):
        answers[model] = answers.get(model, "") + piece
    return answers


def expected(host, tokenizer, messages, adapter):
    return generate(host, tokenizer, [Prompt(tuple(messages), adapter)], GREEDY)[0]


def test_answers_are_those_of_generate_to_all_that_was_said(conversation, host, tiny_tokenizer):
    messages = [{"role": "user", "content": "one"}]
    first = said(conversation, "one", ["lora"])
    assert first == {"lora": expected(host, tiny_tokenizer, messages, "lora")}
    messages += [
        {"role": "assistant", "content": first["lora"]},
        {"role": "user", "content": "two"},
    ]
    second = said(conversation, "two", ["base"])  # it reads what the adapter answered
    assert second == {"base": expected(host, tiny_tokenizer, messages, None)}


def test_models_that_are_compared_keep_their_own_answers(conversation, host, tiny_tokenizer):
    first = said(conversation, "one", ["lora", "mixlora"])
    assert list(first) == ["lora", "mixlora"]
    second = said(conversation, "two", ["lora", "mixlora"])
    for name, answer in second.items():
        messages = [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": first[name]},
            {"role": "user", "content": "two"},
        ]
        assert answer == expected(host, tiny_tokenizer, messages, name)


def test_a_conversation_that_has_no_room_is_an_error(conversation):
    with pytest.raises(RequestError, match="must have at most 128 tokens together"):
        said(conversation, "one " * 200, ["lora"])
    assert conversation.turns == []
    assert said(conversation, "one", ["lora"])


def test_without_a_chat_template_each_message_is_read_alone(make_engine, host, tiny_tokenizer):
    conversation = Conversation(make_engine(), tiny_tokenizer)
    said(conversation, "one", ["lora"])
    answer = generate(host, tiny_tokenizer, [Prompt("the sky", "lora")], GREEDY)[0]
    assert said(conversation, "the sky", ["lora"]) == {"lora": answer}
