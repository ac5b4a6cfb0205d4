"""What is learnt of every kind of conversation in the templates of twelve families, and `hermes`.

Where trl has a family's template it is taken from there; the others are in the family's format.
"""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import apply_chat_template
from trl import chat_template_utils as trl

from loraloom.config.data import TOOL_TEMPLATE
from loraloom.data.chat import learn_answers, read_conversation
from loraloom.data.sources import Row
from loraloom.data.templates import ChatTemplate
from loraloom.data.tokens import NO_LOSS, Example
from loraloom.errors import DataError
from tests.conftest import build_tokenizer
from tests.data.encoded import encode

_FILE = yaml.safe_load(Path(__file__).with_name("conversations.yaml").read_text())
KINDS = _FILE["conversations"]
_TRL = {
    "llama-3": "llama3",
    "gemma": "gemma",
    "phi-3": "phi3",
    "qwen2.5": "qwen2_5",
    "qwen3": "qwen3",
    "deepseek": "deepseekv3",
    "command-r": "cohere",
}
FAMILIES = _FILE["templates"] | {
    family: getattr(trl, f"{name}_chat_template") for family, name in _TRL.items()
}
FAMILIES["hermes"] = TOOL_TEMPLATE
TRAINING = {family: getattr(trl, f"{name}_training_chat_template") for family, name in _TRL.items()}
"""What trl trains with, where it has something."""

EXPECTED = _FILE["learnt"]


def learn(family: str, kind: str, template: str | None = None) -> list[Example]:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = FAMILIES[family]
    row = Row(KINDS[kind], "chat.jsonl, line 3")
    return learn_answers(ChatTemplate(tokenizer, template), row, read_conversation(row))


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
    how = {"return_dict": True, "return_assistant_tokens_mask": True}
    encoding = tokenizer.apply_chat_template(
        conversation.messages, conversation.tools, chat_template=TRAINING[family], **how
    )
    marks = zip(encoding["input_ids"], encoding["assistant_masks"], strict=True)
    labels = tuple(token if mark else NO_LOSS for token, mark in marks)
    return Example(tuple(encoding["input_ids"]), labels)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_is_learnt_as_it_would_be_generated_or_refused(family, kind):
    wanted = EXPECTED[family][kind]
    if isinstance(wanted, list):
        assert spans(learn(family, kind)) == wanted
    else:
        with pytest.raises(DataError, match=f"chat.jsonl, line 3: .*{wanted}"):
            learn(family, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", TRAINING)
def test_trls_template_gives_trls_tokens_and_masks(family, kind):
    is_written = kind in ("turns", "system", "sharegpt") or "qwen" in family
    if is_written and (family, kind) not in (("gemma", "system"), ("qwen2.5", "reasoning")):
        assert learn(family, kind, TRAINING[family]) == [train_with_trl(family, kind)]
    else:
        with pytest.raises(DataError, match=r"drops|rejects"):
            learn(family, kind, TRAINING[family])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("for_answer", [True, False])
def test_a_conversation_is_written_as_transformers_writes_it(family, kind, for_answer):
    tokenizer, conversation = build_tokenizer(), read_conversation(Row(KINDS[kind], "row"))
    tokenizer.chat_template = FAMILIES[family]
    template = ChatTemplate(tokenizer)
    ours = rendered(lambda: template.render(conversation, for_answer=for_answer))
    how = {"tokenize": False, "add_generation_prompt": for_answer}
    messages, tools = conversation.messages, conversation.tools
    assert ours == rendered(lambda: tokenizer.apply_chat_template(messages, tools, **how))


PROMPT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "sky?"}]
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
ANSWERS = {
    role: [{"role": "assistant", "content": content}]
    for role, content in {"completion": "blue", "chosen": "blue", "rejected": "no"}.items()
}


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize(
    ("data_format", "roles"),
    [("chat", ["completion"]), ("preference", ["chosen", "rejected"])],
)
def test_prompts_and_answers_of_messages_are_learned_as_trl_writes_them(data_format, roles, thinks):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = FAMILIES["qwen3"]
    asked = [*PROMPT, {"role": "assistant", "content": "?"}, {"role": "user", "content": "sky?"}]
    row = {"prompt": asked, **{role: ANSWERS[role] for role in roles}}
    row["chat_template_kwargs"] = {"enable_thinking": thinks}
    expected = apply_chat_template(row, tokenizer, tools=TOOLS)
    row["tools"] = json.dumps(TOOLS)
    (encoded,) = encode(tokenizer, [Row(row, "row")], 4096, format=data_format)
    for role, piece in zip(roles, encoded.pieces, strict=True):
        assert tokenizer.decode(piece.input_ids) == expected["prompt"] + expected[role]
        assert spans([piece]) == [expected[role]]


def rendered(render: Callable[[], Any]) -> str:
    try:
        return render()
    except Exception as error:
        return str(error)
