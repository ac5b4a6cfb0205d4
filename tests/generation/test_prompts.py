from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest

from loraloom.config.data import PromptForm
from loraloom.data.templates import given_source, load_template, render
from loraloom.data.tokens import learn_completions
from loraloom.errors import ConfigError, DataError
from loraloom.generation.prompts import Prompt, encode_prompt, form_for
from loraloom.host.host import Host

TEMPLATE = (
    "{% for m in messages %}({{ m.role }}) {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}(assistant){% endif %}"
)
TURNS = ({"role": "user", "content": "yes?"}, {"role": "assistant", "content": "no"})


def decoded(tokenizer, content, form=None, **options):
    return tokenizer.decode(encode_prompt(tokenizer, Prompt(content), form, **options)[0])


def test_what_can_not_be_written_is_an_error(tiny_tokenizer):
    with pytest.raises(DataError, match="line 3: the tokenizer must have a chat template"):
        encode_prompt(tiny_tokenizer, Prompt(TURNS, origin="a.jsonl, line 3"))
    with pytest.raises(DataError, match="--prompt: the prompt must not be empty"):
        encode_prompt(tiny_tokenizer, Prompt("", origin="--prompt"))
    tiny_tokenizer.chat_template = TEMPLATE
    tools = [{"type": "function", "function": {"name": "paint"}}]
    with pytest.raises(DataError, match="line 3: the chat template drops the tools"):
        encode_prompt(tiny_tokenizer, Prompt(TURNS, origin="a.jsonl, line 3", tools=tools))
    for prompt in (Prompt(TURNS), Prompt("one", tools=tools)):
        with pytest.raises(DataError, match="messages and tools require a template; remove raw"):
            encode_prompt(tiny_tokenizer, prompt, raw=True)
    calls = (TURNS[0], {"role": "assistant", "tool_calls": tools}, TURNS[0])
    with pytest.raises(DataError, match="the chat template drops the tool_calls of message 2"):
        encode_prompt(tiny_tokenizer, Prompt(calls))
    with pytest.raises(DataError, match="prompt template does not support tools"):
        encode_prompt(tiny_tokenizer, Prompt(calls), PLAIN)


TOOLS = [{"type": "function", "function": {"name": "paint", "parameters": {}}}]
CALL = {"type": "function", "function": {"name": "paint", "arguments": {"color": "blue"}}}


def test_hermes_writes_tools_calls_and_results(tiny_tokenizer):
    with pytest.raises(DataError, match="hermes requires a tokenizer with the tokens"):
        given_source(tiny_tokenizer, "hermes")
    tiny_tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    form = PromptForm(format="chat", chat_template=given_source(tiny_tokenizer, "hermes"))
    system = {"role": "system", "content": "Be brief."}
    call = {"role": "assistant", "content": "Sure.", "tool_calls": [CALL]}
    turns = (system, TURNS[0], call, {"role": "tool", "content": "done"})
    ids, turn_end = encode_prompt(tiny_tokenizer, Prompt(turns, tools=TOOLS), form)
    text = tiny_tokenizer.decode(ids)
    assert turn_end == "<|im_end|>"
    assert text.startswith(
        "<|im_start|>system\nBe brief.\n\nYou may call these functions:\n<tools>"
    )
    called = '<tool_call>\n{"name": "paint", "arguments": {"color": "blue"}}\n</tool_call>'
    assert f"<|im_start|>assistant\nSure.\n{called}<|im_end|>\n<|im_start|>user\n" in text
    assert "user\n<tool_response>\ndone\n</tool_response><|im_end|>\n<|im_start|>as" in text


def test_tools_are_written_in_their_form_unless_the_adapter_has_a_template():
    tool_form = PromptForm(format="chat", chat_template="tools")
    forms = {
        None: None,
        "base": PromptForm(format="chat", system="Be brief."),
        "text": PromptForm(format="text"),
        "chat": PromptForm(format="chat", chat_template="x"),
        "plain": PLAIN,
    }
    host = create_autospec(Host, instance=True)
    host.default_form = None
    host.adapter = lambda name: SimpleNamespace(prompt=forms[name])
    written = {name: form_for(host, name, tool_form) for name in forms}
    assert written == {
        None: tool_form,
        "base": tool_form.model_copy(update={"system": "Be brief."}),
        "text": tool_form,
        "chat": forms["chat"],
        "plain": PLAIN,
    }


def test_an_answer_ends_with_the_token_that_the_chat_template_puts_behind_it(tiny_tokenizer):
    tiny_tokenizer.add_tokens(["<|im", "<|im_end|>"], special_tokens=True)
    tiny_tokenizer.chat_template = TEMPLATE.replace("\n", "<|im_end|>\n")
    assert encode_prompt(tiny_tokenizer, Prompt(TURNS))[1] == "<|im_end|>"
    assert encode_prompt(tiny_tokenizer, Prompt("one"), raw=True)[1] is None
    tiny_tokenizer.eos_token = "<|im_end|>"
    assert encode_prompt(tiny_tokenizer, Prompt(TURNS))[1] == ""


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("content", ["one \ud800 two", ({"role": "user", "content": "\udcff"},)])
def test_half_a_surrogate_pair_is_an_error(tiny_tokenizer, template, content):
    tiny_tokenizer.chat_template = template or (None if isinstance(content, str) else TEMPLATE)
    with pytest.raises(DataError, match=r"a\.jsonl: the prompt must be a text of Unicode"):
        encode_prompt(tiny_tokenizer, Prompt(content, origin="a.jsonl"))


PLAIN = PromptForm(format="instruction", template="plain")


def test_a_prompt_goes_into_the_chat_template_if_there_is_one(tiny_tokenizer):
    assert decoded(tiny_tokenizer, "one two") == "one two"
    tiny_tokenizer.chat_template = TEMPLATE
    assert decoded(tiny_tokenizer, "one two") == "(user) one two\n(assistant)"
    assert decoded(tiny_tokenizer, "one two", raw=True) == "one two"
    assert decoded(tiny_tokenizer, TURNS) == "(user) yes?\n(assistant) no\n(assistant)"
    tiny_tokenizer.chat_template = "{{ raise_exception('no assistant please') }}"
    with pytest.raises(DataError, match="rejects the messages: no assistant please"):
        encode_prompt(tiny_tokenizer, Prompt(TURNS))


def test_a_prompt_is_written_as_the_adapters_training_data_was(tiny_tokenizer):
    tiny_tokenizer.chat_template = TEMPLATE
    assert decoded(tiny_tokenizer, "one", PLAIN) == "one\n"
    chat = PromptForm(format="chat", chat_template="{{ messages[0].content }}!", system="two")
    assert decoded(tiny_tokenizer, "one", chat) == "two!"
    developer = ({"role": "developer", "content": "yes"}, {"role": "user", "content": "one"})
    assert decoded(tiny_tokenizer, developer, chat) == "yes!"
    for is_text in ("text", "task", "preference"):
        assert decoded(tiny_tokenizer, "one", PromptForm(format=is_text)) == "one"
    assert decoded(tiny_tokenizer, "one", PLAIN, raw=True) == "one"


def test_another_default_chat_template_is_not_that_of_adapters():
    host = create_autospec(Host, default_form=PromptForm(format="chat", chat_template="x"))
    own = PromptForm(format="chat", system="two")
    for form, expected in ((own, own), (None, host.default_form)):
        host.adapter.return_value = SimpleNamespace(prompt=form)
        assert form_for(host, "law") == expected
    host.adapter.return_value = SimpleNamespace(prompt=PromptForm(format="text"))
    assert form_for(host, "law").chat_template == "x"


def test_turns_of_instructions_are_joined_as_examples_are(tiny_tokenizer):
    end = tiny_tokenizer.eos_token
    turns = ({"role": "system", "content": "two"}, *TURNS, {"role": "user", "content": "one"})
    assert decoded(tiny_tokenizer, turns, PLAIN) == f"two\n\nyes?\nno{end}one\n"
    silent = ({"role": "assistant", "content": None}, {"role": "user", "content": "one"})
    assert decoded(tiny_tokenizer, silent, PLAIN) == f"{end}one\n"
    with pytest.raises(DataError, match="a system message must come before"):
        decoded(tiny_tokenizer, (*TURNS, turns[0]), PLAIN)


def test_a_text_has_no_turns_and_leaves_a_conversation_to_the_chat_template(tiny_tokenizer):
    tiny_tokenizer.chat_template = TEMPLATE
    form = PromptForm(format="text")
    assert decoded(tiny_tokenizer, TURNS[:1], form) == "yes?"
    assert decoded(tiny_tokenizer, TURNS, form) == "(user) yes?\n(assistant) no\n(assistant)"


def test_a_prompt_template_reads_further_fields_of_a_row(tiny_tokenizer):
    form = PromptForm(format="instruction", template="[{{ topic }}] {{ instruction }}: ")
    other = form.model_copy(update={"template": "{{ input }}{{ 'a' | regex_replace('a', 'no') }}"})
    assert decoded(tiny_tokenizer, "one", other) == "no"
    prompt = Prompt("one", fields={"topic": "two"})
    assert tiny_tokenizer.decode(encode_prompt(tiny_tokenizer, prompt, form)[0]) == "[two] one:"
    prompt = Prompt("one", fields={"input": "two"})
    assert tiny_tokenizer.decode(encode_prompt(tiny_tokenizer, prompt)[0]) == "one\n\ntwo"
    with pytest.raises(DataError, match="can't be filled in: 'topic' is undefined; pass rows"):
        encode_prompt(tiny_tokenizer, Prompt("one"), form)
    for one, lacking in ((form, "topic"), (other, "regex_replace")):
        with pytest.raises(ConfigError, match=f"prompt template needs {lacking}, and a chat"):
            one.as_chat_template(None, adds_bos=False)


WITH_INPUT = (
    "{% if input %}\n{{ input }}\n{% endif %}\n{{ instruction }}\n  {# no #}\n"
    "{% raw %}\n{% one %} {{ two }}\n  {% endraw %}\n{{ '{% three %}' }}{{ topic | d('four') }}\n"
)


@pytest.mark.parametrize("space", ["", " "])  # as a person writes an answer, and as a model does
@pytest.mark.parametrize("template", ["alpaca", "plain", WITH_INPUT, "one: {{ instruction }} "])
def test_turns_are_written_as_training_encodes_them(tiny_tokenizer, template, space):
    form = PromptForm(format="instruction", template=template)
    prompt = render(load_template(template), {"instruction": "yes?", "input": ""})
    expected = list(learn_completions(tiny_tokenizer, [(prompt, "no")])[0].input_ids) * 2
    before = space if prompt.endswith(" ") else ""
    turns = [TURNS[0], {"role": "assistant", "content": f"{before}no"}] * 2
    assert encode_prompt(tiny_tokenizer, Prompt(tuple(turns)), form)[0] == expected
    tiny_tokenizer.chat_template = form.as_chat_template(None, adds_bos=False)
    assert tiny_tokenizer.apply_chat_template(turns, return_dict=False) == expected


def test_a_system_message_becomes_a_part_of_the_chat_template(tiny_tokenizer):
    form = PromptForm(format="chat", system='two \U0001f600 "{{ }}"')
    tiny_tokenizer.chat_template = form.as_chat_template(TEMPLATE, adds_bos=False)
    developer = [{"role": "developer", "content": "one"}, TURNS[0]]
    written = tiny_tokenizer.apply_chat_template(developer, tokenize=False)
    assert written == "(developer) one\n(user) yes?\n"
    written = tiny_tokenizer.apply_chat_template(list(TURNS[:1]), tokenize=False)
    assert written == '(system) two \U0001f600 "{{ }}"\n(user) yes?\n'
