"""Prompts, and the tokens that a model reads of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import PromptForm
from loraloom.data.chat import omitted_tools
from loraloom.data.control_tokens import drop_marks, mark_control_tokens
from loraloom.data.templates import ChatTemplate, Conversation, Message, compile_template, render
from loraloom.data.tokens import encode_texts
from loraloom.errors import DataError, shown
from loraloom.host.choice import Choice, is_routed
from loraloom.host.host import Host
from loraloom.host.layout import RowAdapter, name_and_scale


@dataclass(frozen=True)
class Prompt:
    """A prompt and the adapter that completes it.

    Args:
        content: String, or messages of a conversation.
        adapter: Name of the adapter, or a name with a scale; None is the base model.
        origin: Source for error messages, for example a file and line.
        tools: JSON schemas of functions that the answer to a conversation may call.
        fields: Further fields for the adapter's prompt template, for example `input`.
        last_alone: Whether only the last message is read if the form has no conversations.
        is_foreign: Whether control tokens in its texts are read as plain text.
    """

    content: str | tuple[Message, ...]
    adapter: RowAdapter = None
    origin: str = "prompt"
    tools: list[dict[str, Any]] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    last_alone: bool = False
    is_foreign: bool = False

    @property
    def uses_tools(self) -> bool:
        turns = () if isinstance(self.content, str) else self.content
        calls = [turn for turn in turns if turn["role"] == "tool" or turn.get("tool_calls")]
        return bool(self.tools or calls)


def form_for(
    host: Host, adapter: RowAdapter, tool_form: PromptForm | None = None
) -> PromptForm | None:
    """The form of prompts; `tool_form` is used instead of the base model's chat template."""
    name, _ = name_and_scale(adapter)
    form = None if name is None else host.adapter(name).prompt
    default = host.default_form
    has_template = form is not None and (form.chat_template or form.format == "instruction")
    if tool_form is not None and not has_template:
        return tool_form.model_copy(update={"system": None if form is None else form.system})
    if form is None:
        return default
    if default is None or not form.is_text:
        return form
    return form.model_copy(update={"chat_template": default.chat_template})  # of messages


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    form: PromptForm | None = None,
    *,
    raw: bool = False,
) -> tuple[list[int], str | None]:
    """Token ids of a prompt, and what ends an answer; None: it continues the prompt's text."""
    # It is written as an adapter's training data was. Without a form, a text is the user's turn in
    # the tokenizer's chat template where there is one, and else read as it stands, as with `raw`.
    if prompt.is_foreign:
        return _encode_foreign(tokenizer, prompt, form, raw=raw)
    has_turns = tokenizer.chat_template if form is None else not form.is_text
    if prompt.last_alone and not isinstance(prompt.content, str) and (raw or not has_turns):
        prompt = replace(prompt, content=prompt.content[-1]["content"])
    is_plain = isinstance(prompt.content, str)
    if raw and (prompt.tools or not is_plain):
        raise DataError(f"{prompt.origin}: messages and tools require a template; remove raw")
    messages = _messages_of(prompt, form, raw=raw)
    has_template = not raw and (form or tokenizer.chat_template or prompt.tools)
    is_user_text = [message["role"] for message in messages] == ["user"] and not prompt.tools
    text = turn_end = None
    if is_plain and not has_template:
        text = messages[-1]["content"]
    elif form is not None and form.format == "instruction":
        text = _render_instructions(tokenizer, messages, prompt, form)
    elif form is not None and form.is_text and is_user_text:
        text = messages[0]["content"]
    if text is not None:
        ids = encode_texts(tokenizer, [text])[0]
    else:
        conversation = Conversation(messages, prompt.tools)
        chat, turn_end = _render_chat(tokenizer, conversation, form, prompt.origin)
        ids = tokenizer(chat, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise DataError(f"{prompt.origin}: the prompt must not be empty")
    return ids, turn_end


def _encode_foreign(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, form: PromptForm | None, *, raw: bool
) -> tuple[list[int], str | None]:
    (content, tools), mark = mark_control_tokens(tokenizer, (prompt.content, prompt.tools))
    content = content if isinstance(content, str) else tuple(content)
    marked = replace(prompt, content=content, tools=tools, is_foreign=False)
    ids, turn_end = encode_prompt(tokenizer, marked, form, raw=raw)
    return drop_marks(tokenizer, ids, mark) if mark else ids, turn_end


def _messages_of(prompt: Prompt, form: PromptForm | None, *, raw: bool) -> list[Message]:
    """A text with its input, or a conversation, after the form's system message if it has none."""
    if isinstance(prompt.content, str):
        text = prompt.content
        more = prompt.fields.get("input")
        has_place = form is not None and form.format == "instruction"  # in its prompt template
        if more and not raw and not has_place:
            text = f"{text}\n\n{more}"
        messages = [{"role": "user", "content": text}]
    else:
        messages = [{**turn, "content": turn.get("content") or ""} for turn in prompt.content]
    has_system = any(message["role"] in ("system", "developer") for message in messages)
    if form is not None and form.system is not None and not has_system:
        messages.insert(0, {"role": "system", "content": form.system})
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{prompt.origin}: the prompt must be a text of Unicode, got half a surrogate pair "
                f"in {shown(message['content'])}; write it in UTF-8"
            ) from None
    return messages


def _render_chat(
    tokenizer: PreTrainedTokenizerBase,
    conversation: Conversation,
    form: PromptForm | None,
    origin: str,
) -> tuple[str, str]:
    """A conversation in the chat template up to its answer, and what ends that."""
    source = None if form is None else form.chat_template  # files name no file of ours
    try:
        template = ChatTemplate(tokenizer, source or None)
        chat = template.render(conversation, for_answer=True)
        _check_tools(template, conversation)
        return chat, template.turn_end()
    except DataError as error:
        raise DataError(f"{origin}: {error}") from None
    except TemplateError as error:
        raise DataError(f"{origin}: the chat template rejects the messages: {error}") from error


def _check_tools(template: ChatTemplate, conversation: Conversation) -> None:
    """Refuse a conversation whose tools, or first call of them, the chat template leaves out."""
    # each is one more rendering of the whole conversation
    for omission in islice(omitted_tools(conversation), 2):
        if omission.is_unnoticed(template):
            raise DataError(
                f"the chat template drops {omission.name}; serve with --tool-template hermes, or "
                "use another chat template"
            )


def encode_for_choice(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    raw: bool = False,
    tool_form: PromptForm | None = None,
) -> list[int]:
    """Token ids by which a router chooses what answers a prompt."""
    name, _ = name_and_scale(prompt.adapter)
    if not raw and name is not None and host.adapter(name).forms_differ:
        texts: list[Any] = [prompt.content]
        if not isinstance(prompt.content, str):
            texts = [message.get("content") for message in prompt.content]
        texts.append(prompt.fields.get("input"))
        content = "\n".join(str(text) for text in texts if text)
        return encode_prompt(tokenizer, replace(prompt, content=content, tools=None), raw=True)[0]
    form = form_for(host, prompt.adapter, tool_form if prompt.uses_tools else None)
    return encode_prompt(tokenizer, prompt, form, raw=raw)[0]


def read_prompts(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    form: PromptForm | None = None,
    *,
    raw: bool = False,
) -> list[tuple[list[int], str | None, Choice]]:
    """Choose what answers prompts, and encode them in its form, or one that is given."""
    encode = partial(encode_for_choice, host, tokenizer, raw=raw)
    # none are needed where nothing is chosen
    ids = [encode(prompt) if is_routed(host, prompt.adapter) else [] for prompt in prompts]
    choices = host.choose(ids, [prompt.adapter for prompt in prompts])
    forms = [form or form_for(host, choice.adapter) for choice in choices]
    return [
        (*encode_prompt(tokenizer, prompt, prompt_form, raw=raw), choice)
        for prompt, prompt_form, choice in zip(prompts, forms, choices, strict=True)
    ]


def _render_instructions(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    prompt: Prompt,
    form: PromptForm,
) -> str:
    """Each user's turn in the prompt template; EOS joins turns, as it does training examples."""
    # Training reads spaces at a prompt's end with the answer, so a model's own begins with them.
    if prompt.uses_tools:
        raise DataError(f"{prompt.origin}: the adapter's prompt template does not support tools")
    template = compile_template(form.prompt_template, "the prompt template")
    written = system = space = ""
    fields = {**prompt.fields}
    if fields.get("input") is None:  # null is none, as in training
        fields["input"] = ""
    for message in messages:
        if message["role"] == "assistant":
            before = space if message["content"][:1].strip() else ""
            written += f"{before}{message['content']}{tokenizer.eos_token or ''}"
            space = ""
        elif message["role"] == "user":
            fields["instruction"] = system + message["content"]
            try:
                question = render(template, fields)
                system = ""
            except TemplateError as error:
                raise DataError(
                    f"{prompt.origin}: the prompt template can't be filled in: {error}; "
                    "pass rows with this field (--input), or use the prompt as written (--raw)"
                ) from error
            written += question.rstrip(" ")
            space = question[len(question.rstrip(" ")) :]
        else:
            system += f"{message['content']}\n\n"
    if system:
        raise DataError(f"{prompt.origin}: a system message must come before a user message")
    return written


def check_token_ids(ids: Sequence[int], vocab_size: int, origin: str) -> None:
    """Refuse what the embedding has no row for, which a GPU would not get over."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise DataError(f"{origin}: token ids must be below {vocab_size}, got {largest}")
