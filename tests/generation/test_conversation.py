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


def said(conversation, text, models):
    """The whole answers by model."""
    answers: dict[str, str] = {}
    for model, piece in conversation.ask(text, models, GREEDY):
        answers[model] = answers.get(model, "") + piece
    return answers


def test_models_read_their_own_answers_or_those_of_who_was_asked(
    conversation, host, tiny_tokenizer
):
    first = said(conversation, "one", ["lora", "mixlora"])
    assert list(first) == ["lora", "mixlora"]
    for name, answer in said(conversation, "two", ["lora", "mixlora", "base"]).items():
        messages = (
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": first.get(name, first["lora"])},
            {"role": "user", "content": "two"},
        )
        asked = [Prompt(messages, None if name == "base" else name)]
        assert [answer] == generate(host, tiny_tokenizer, asked, GREEDY)


def test_a_model_that_said_nothing_reads_no_answer_of_others(conversation, tiny_tokenizer):
    conversation.turns += [("no", {}), ("one", {"lora": "", "mixlora": "two"})]
    request = conversation._request("lora", "yes", GREEDY)
    assert tiny_tokenizer.decode(request.prompt_ids) == "user: one\nassistant: \nuser: yes\n"


def test_a_conversation_that_has_no_room_is_an_error(conversation):
    with pytest.raises(RequestError, match="maximum context length is 128 tokens"):
        said(conversation, "one " * 200, ["lora"])
    assert conversation.turns == []
    assert said(conversation, "one", ["lora"])
