"""Control tokens in messages are read as text; all other messages as they were."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loraloom.errors import DataError
from loraloom.generation.prompts import Prompt, encode_prompt
from tests.conftest import build_tokenizer
from tests.data.test_chat_families import FAMILIES

CONTROL = ["<|im_start|>", "<|im_end|>", "<|reserved_7|>", "<｜User｜>"]
TOOL = {
    "name": "paint",
    "description": "<|im_end|>",
    "parameters": {"<|im_end|>": {"type": "string"}},
}
CALL = {"function": {"name": "paint<eos>", "arguments": {"<|im_end|>": "<|im_start|>"}}}


@pytest.fixture
def tokenizer(tiny_tokenizer):
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": CONTROL[:3]})
    tiny_tokenizer.add_tokens(["<｜User｜>", "<think>"])
    return tiny_tokenizer


def chat(*contents):
    roles = ("user", "assistant")
    return tuple(
        {"role": roles[place % 2], "content": content} for place, content in enumerate(contents)
    )


def encode(tokenizer, content, *, is_foreign=True, **fields):
    return encode_prompt(tokenizer, Prompt(content, is_foreign=is_foreign, **fields))[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["What color? < | > <b> \ue000 <think>ñ", "<|im_end", "\n<eo s>"])
def test_texts_without_control_tokens_are_encoded_as_ever(tokenizer, family, text):
    tokenizer.chat_template = FAMILIES[family]
    content = chat(text, "blue", text)
    assert encode(tokenizer, content) == encode(tokenizer, content, is_foreign=False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("control", [*CONTROL, "<eos>", "<<eos><eos>", "<|im_<|im_end|>end|>"])
def test_control_tokens_of_messages_become_text(tokenizer, family, control):
    tokenizer.chat_template = FAMILIES[family]
    specials = {*tokenizer.all_special_ids, tokenizer.convert_tokens_to_ids("<｜User｜>")}
    texts = [f"so {control} {{}}".format(text) for text in ("one", "two", "three")]
    ids = encode(tokenizer, chat(*texts))
    harmless = encode(tokenizer, chat(*(text.replace(control, "or") for text in texts)))
    trusted = encode(tokenizer, chat(*texts), is_foreign=False)
    assert tokenizer.decode(ids) == tokenizer.decode(trusted)
    assert [i for i in ids if i in specials] == [i for i in harmless if i in specials]
    assert sum(i in specials for i in trusted) > sum(i in specials for i in ids)


def test_systems_tools_calls_and_results_are_texts_too(tokenizer):
    turn = "<|im_start|>{{ m | tojson }}<|im_end|>"
    tokenizer.chat_template = (
        f"{{{{ tools | tojson }}}}{{% for m in messages %}}{turn}{{% endfor %}}"
    )
    tool, other = {"type": "function", "function": TOOL}, {"role": "tool", "name": "<|im_end|>"}
    messages = (
        {"role": "system", "content": "<|im_end|>"},
        {"role": "user", "content": "<|im_end|>"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        other | {"content": "<|im_end|>", "tool_call_id": "<|im_end|>"},
    )
    ids = encode(tokenizer, messages, tools=[tool])
    trusted = encode(tokenizer, messages, tools=[tool], is_foreign=False)
    assert tokenizer.decode(ids) == tokenizer.decode(trusted)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert (ids.count(start), ids.count(end)) == (4, 4)
    assert trusted.count(end) > 4


def test_a_tokenizer_that_has_no_token_for_the_mark_refuses():
    pieces = models.WordLevel({"<unk>": 0, "a": 1, "<eos>": 2}, unk_token="<unk>")
    model = Tokenizer(pieces)
    model.pre_tokenizer, model.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert encode(tokenizer, chat("a a")) == [1, 1]
    with pytest.raises(DataError, match="must not contain control tokens"):
        encode(tokenizer, chat("a <eos> a"))


def test_a_text_with_every_private_character_is_refused():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    text = "".join(map(chr, range(0xE000, 0xF900))) + "<eos>"
    with pytest.raises(DataError, match="must not contain control tokens"):
        encode(tokenizer, chat(text))
