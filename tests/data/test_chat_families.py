"""What is learnt of every kind of conversation in the templates of twelve families."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest

from loraloom.data.chat import learn_answers, read_conversation
from loraloom.data.sources import Row
from loraloom.data.templates import load_chat_template
from loraloom.data.tokens import NO_LOSS, Example
from loraloom.errors import DataError
from tests.conftest import build_tokenizer
from tests.data.chat_families import FAMILIES, KINDS, TRAINING

CALL = '{"name": "color", "arguments": {"of": "sky"}}'
NO_THOUGHT = "<think>\n\n</think>\n\n"
QWEN_CALL = f"<tool_call>\n{CALL}\n</tool_call><|im_end|>\n"
NO_TOOLS = "the chat template leaves out the tools; give chat_template one"
NO_REASONING = "the chat template leaves out the reasoning of message 2"
ALTERNATE = "does not fit the chat template: Conversation roles must alternate"
ENDS = {
    "chatml": "<|im_end|>\n",
    "llama-2": " <eos>",
    "llama-3": "<|eot_id|>",
    "mistral": "<eos>",
    "gemma": "<end_of_turn>\n",
    "phi-3": "<|end|>\n",
    "qwen2.5": "<|im_end|>\n",
    "qwen3": "<|im_end|>\n",
    "zephyr": "<eos>\n",
    "command-r": "<|END_OF_TURN_TOKEN|>",
    "granite": "<|end_of_text|>\n",
}
BEGINNINGS = {"llama-2": " ", "mistral": " ", "qwen3": NO_THOUGHT}
TOOLS = {
    "chatml": NO_TOOLS,
    "llama-2": "does not fit the chat template: roles must alternate",
    "llama-3": NO_TOOLS,
    "mistral": [f"[TOOL_CALLS] [{CALL}]<eos>"],
    "gemma": ALTERNATE,
    "phi-3": NO_TOOLS,
    "qwen2.5": [QWEN_CALL],
    "qwen3": [NO_THOUGHT + QWEN_CALL],
    "zephyr": NO_TOOLS,
    "command-r": ALTERNATE,
    "granite": [f"<|tool_call|>[{CALL}]<|end_of_text|>\n"],
}
DEEPSEEK = {"tools": "does not fit the chat template: can only", "reasoning": NO_REASONING}
TRL_BEGINS_EARLIER = {"qwen2.5": "\n", "deepseek": "<｜Assistant｜>"}
"""What trl marks of the text that asks for an answer."""


def expected(family: str, kind: str) -> list[str] | str:
    """The texts that are learnt, or what the error says."""
    if family == "deepseek":
        return DEEPSEEK.get(
            kind, r"asks for message \d with '<think>\\n' where it then writes 'blue"
        )
    blue, yes = (BEGINNINGS.get(family, "") + answer + ENDS[family] for answer in ("blue", "yes"))
    last = "<eos>" if family == "phi-3" else ""
    if kind == "tools":
        calls = TOOLS[family]
        return calls if isinstance(calls, str) else [*calls, blue + last]
    if kind == "reasoning":
        thoughts = ("<think>\nLook up.\n", "blue"), ("<think>\nIt is.\n", "yes")
        thought = [f"{text}</think>\n\n{said}{ENDS[family]}" for text, said in thoughts]
        return thought if family == "qwen3" else NO_REASONING
    if (family, kind) == ("gemma", "system"):
        return "does not fit the chat template: System role not supported"
    return [blue, yes + last]


def learn(family: str, kind: str, template: str | None = None) -> list[Example]:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = FAMILIES[family]
    row = Row(KINDS[kind], "chat.jsonl, line 3")
    return learn_answers(
        tokenizer, load_chat_template(tokenizer, template), row, read_conversation(row)
    )


def spans(texts: list[Example]) -> list[str]:
    """The text of each run of learnt tokens."""
    tokenizer, found = build_tokenizer(), []
    for text in texts:
        for is_learnt, run in groupby(text.labels, lambda label: label != NO_LOSS):
            found += [tokenizer.decode(list(run))] if is_learnt else []
    return found


def train_with_trl(family: str, kind: str) -> Example:
    """The tokens of a conversation as trl trains on them."""
    tokenizer, conversation = build_tokenizer(), read_conversation(Row(KINDS[kind], "row"))
    encoding = tokenizer.apply_chat_template(
        conversation.messages,
        conversation.tools,
        chat_template=TRAINING[family],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    marks = zip(encoding["input_ids"], encoding["assistant_masks"], strict=True)
    labels = tuple(token if mark else NO_LOSS for token, mark in marks)
    return Example(tuple(encoding["input_ids"]), labels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_learnt_as_it_would_be_generated_or_refused(family, kind):
    wanted = expected(family, kind)
    if isinstance(wanted, list):
        assert spans(learn(family, kind)) == wanted
    else:
        with pytest.raises(DataError, match=f"chat.jsonl, line 3: .*{wanted}"):
            learn(family, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TRAINING)
def test_the_same_is_learnt_as_by_trl_with_its_own_template(family, kind):
    if isinstance(expected(family, kind), str):
        return
    theirs = spans([train_with_trl(family, kind)])
    assert spans(learn(family, kind)) == [
        text.removeprefix(TRL_BEGINS_EARLIER.get(family, "")) for text in theirs
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TRAINING)
def test_trls_template_gives_trls_tokens_and_masks(family, kind):
    is_written = kind in ("turns", "system", "sharegpt") or "qwen" in family
    if is_written and (family, kind) not in (("gemma", "system"), ("qwen2.5", "reasoning")):
        assert learn(family, kind, "trl") == [train_with_trl(family, kind)]
    else:
        with pytest.raises(DataError, match=r"leaves out|does not fit"):
            learn(family, kind, "trl")


def test_qwen3_learns_a_text_for_each_question():
    texts = learn("qwen3", "reasoning")
    whole = [build_tokenizer().decode(text.input_ids) for text in texts]
    asked = "<|im_start|>user\ncolor?<|im_end|>\n<|im_start|>assistant\n"
    assert whole[0] == f"{asked}<think>\nLook up.\n</think>\n\nblue<|im_end|>\n"
    assert whole[1].startswith(f"{asked}blue<|im_end|>\n<|im_start|>user\ntrue?<|im_end|>\n")
    assert [len(spans([text])) for text in texts] == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("for_answer", [True, False])
def test_a_conversation_is_written_as_transformers_writes_it(family, kind, for_answer):
    tokenizer, conversation = build_tokenizer(), read_conversation(Row(KINDS[kind], "row"))
    tokenizer.chat_template = FAMILIES[family]
    template = load_chat_template(tokenizer)
    ours = rendered(lambda: template.render(conversation, for_answer=for_answer))
    assert ours == rendered(
        lambda: tokenizer.apply_chat_template(
            conversation.messages,
            conversation.tools,
            tokenize=False,
            add_generation_prompt=for_answer,
        )
    )


def rendered(render: Callable[[], Any]) -> str:
    try:
        return render()
    except Exception as error:
        return str(error)
