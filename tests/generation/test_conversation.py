import pytest

from loraloom.generation.generate import Conversation, generate
from loraloom.generation.prompts import Prompt
from loraloom.generation.request import RequestError
from loraloom.generation.sampling import SamplingConfig

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
GREEDY = SamplingConfig(max_new_tokens=6)


@pytest.fixture
def conversation(make_engine, tiny_tokenizer):
    tiny_tokenizer.chat_template = TEMPLATE
    return Conversation(make_engine(), tiny_tokenizer)


def said(conversation, text, model):
    return "".join(conversation.ask(text, model, GREEDY))


def test_models_read_the_answers_of_who_was_asked_before(conversation, host, tiny_tokenizer):
    messages = []
    for text, name in (("one", "lora"), ("two", "mixlora"), ("three", None)):
        messages.append({"role": "user", "content": text})
        answer = said(conversation, text, name or "base")
        assert [answer] == generate(host, tiny_tokenizer, [Prompt(tuple(messages), name)], GREEDY)
        messages.append({"role": "assistant", "content": answer})
    assert conversation.turns == messages


def test_a_conversation_that_has_no_room_is_an_error(conversation):
    with pytest.raises(RequestError, match="maximum context length is 128 tokens"):
        said(conversation, "one " * 200, "lora")
    assert conversation.turns == []
    assert said(conversation, "one", "lora")
