from __future__ import annotations

import pytest

from loraloom.errors import DataError
from loraloom.infer.prompts import Prompt, encode_prompt

TEMPLATE = (
    "{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}(assistant){% endif %}"
)
TURNS = ({"role": "user", "content": "yes?"}, {"role": "assistant", "content": "no"})


def decoded(tokenizer, content, **options):
    return tokenizer.decode(encode_prompt(tokenizer, Prompt(content), **options))


def test_a_text_is_read_as_it_stands_without_a_template(tiny_tokenizer):
    assert decoded(tiny_tokenizer, "one two") == "one two"


def test_a_text_is_the_users_turn_in_a_template(tiny_tokenizer):
    tiny_tokenizer.chat_template = TEMPLATE
    assert decoded(tiny_tokenizer, "one two") == "(user) one two\n(assistant)"


def test_raw_leaves_the_template_out(tiny_tokenizer):
    tiny_tokenizer.chat_template = TEMPLATE
    assert decoded(tiny_tokenizer, "one two", raw=True) == "one two"


def test_a_conversation_goes_into_the_template(tiny_tokenizer):
    tiny_tokenizer.chat_template = TEMPLATE
    assert decoded(tiny_tokenizer, TURNS) == "(user) yes?\n(assistant) no\n(assistant)"


def test_a_conversation_without_a_template_is_an_error(tiny_tokenizer):
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 3: the tokenizer must have a chat template"
    ):
        encode_prompt(tiny_tokenizer, Prompt(TURNS, origin="a.jsonl, line 3"))


def test_what_a_template_refuses_is_an_error(tiny_tokenizer):
    tiny_tokenizer.chat_template = "{{ raise_exception('no assistant please') }}"
    with pytest.raises(DataError, match="do not fit the chat template: no assistant please"):
        encode_prompt(tiny_tokenizer, Prompt(TURNS))


def test_an_empty_prompt_is_an_error(tiny_tokenizer):
    with pytest.raises(DataError, match="--prompt: the prompt must not be empty"):
        encode_prompt(tiny_tokenizer, Prompt("", origin="--prompt"))


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("content", ["one \ud800 two", ({"role": "user", "content": "\udcff"},)])
def test_half_a_surrogate_pair_is_an_error(tiny_tokenizer, template, content):
    tiny_tokenizer.chat_template = template or (None if isinstance(content, str) else TEMPLATE)
    with pytest.raises(
        DataError, match=r"a\.jsonl: the prompt must be a text of Unicode, got half"
    ):
        encode_prompt(tiny_tokenizer, Prompt(content, origin="a.jsonl"))
