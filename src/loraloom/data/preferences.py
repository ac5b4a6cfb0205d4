"""Pairs of answers, a better and a worse one: texts, or messages in the chat template."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from loraloom.data.chat import learn_answers
from loraloom.data.chat_template import TRAINING_DAY, ChatTemplate, load_chat_template
from loraloom.data.encoding import (
    EncodedRow,
    LearntTokens,
    encode_each,
    fit_pair,
    learn_completions,
)
from loraloom.data.messages import Conversation, read_messages, read_tools
from loraloom.data.rows import Row
from loraloom.data.tokenising import count_shared, leading_tokens

TextPair = tuple[tuple[str, str], tuple[str, str]]
"""Prompt and completion of the chosen, and of the rejected."""


def encode_preferences(
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    first: Row,
    columns: dict[str, str],
    max_length: int,
    chat_template: str | None = None,
) -> list[EncodedRow]:
    """Rows of `prompt`, `chosen` and `rejected` with a loss on both answers.

    Texts are read as they stand, with an EOS after each answer. Where `chosen` and `rejected` are
    messages they follow those of `prompt`; without such a prompt, both are whole conversations and
    what they begin with alike is the prompt.
    """
    names = {role: columns.get(role, role) for role in ("prompt", "chosen", "rejected")}
    if isinstance(first[names["chosen"]], str):
        return encode_each(
            rows,
            lambda row: _read_texts(row, names),
            lambda pairs: encode_text_pairs(tokenizer, pairs, max_length),
        )
    template = load_chat_template(tokenizer, chat_template, TRAINING_DAY)
    start = leading_tokens(tokenizer)
    return encode_each(
        rows,
        lambda row: fit_pair(
            *_learn_conversations(tokenizer, template, row, names), start, max_length
        ),
        list,
    )


def encode_text_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[TextPair], max_length: int
) -> list[EncodedRow]:
    """Chosen and rejected texts, each after its prompt, with a loss on the text and an EOS."""
    start = leading_tokens(tokenizer)
    chosen = learn_completions(tokenizer, [pair[0] for pair in pairs])
    rejected = learn_completions(tokenizer, [pair[1] for pair in pairs])
    return [fit_pair(*answers, start, max_length) for answers in zip(chosen, rejected, strict=True)]


def _read_texts(row: Row, names: dict[str, str]) -> TextPair:
    prompt = row.text(names["prompt"])
    return (prompt, row.answer(names["chosen"])), (prompt, row.answer(names["rejected"]))


def _learn_conversations(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, row: Row, names: dict[str, str]
) -> tuple[LearntTokens, LearntTokens]:
    chosen, rejected = (read_messages(row, names[role]) for role in ("chosen", "rejected"))
    if isinstance(row.get(names["prompt"]), list):
        prompt = read_messages(row, names["prompt"])
        first, chosen, rejected = len(prompt), [*prompt, *chosen], [*prompt, *rejected]
    else:
        first = count_shared(chosen, rejected)
    tools = read_tools(row, "tools")
    return (
        _learn_answer(tokenizer, template, row, Conversation(chosen, tools), first),
        _learn_answer(tokenizer, template, row, Conversation(rejected, tools), first),
    )


def _learn_answer(
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    row: Row,
    conversation: Conversation,
    first: int,
) -> LearntTokens:
    texts = learn_answers(tokenizer, template, row, conversation, first)
    if len(texts) > 1:
        row.reject(
            "an answer of several turns must be one text, and the chat template writes its earlier "
            "turns differently once others follow; give chat_template one that does not"
        )
    return texts[0]
