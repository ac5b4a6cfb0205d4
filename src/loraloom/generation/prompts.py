"""Prompts, and the tokens that a model reads of them."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from jinja2 import TemplateError
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase

from loraloom.adapters.routed.choice import Choice
from loraloom.config.data import PromptForm
from loraloom.data.chat import omitted_tools
from loraloom.data.control_tokens import drop_marks, mark_control_tokens
from loraloom.data.templates import ChatTemplate, Conversation, Message, compile_template, render
from loraloom.data.tokens import encode_texts
from loraloom.errors import DataError, shown
from loraloom.generation.request import RequestError
from loraloom.host.choice import is_routed
from loraloom.host.host import Host
from loraloom.host.layout import RowAdapter, name_and_scale

# A name that no text has, by which a tool is looked for in what the chat template made of it.
_MARK = "loraloom-1b5ff3a2-"
# Of each tokenizer, what ends an answer, by the chat template and the end-of-text token.
_TURN_ENDS: WeakKeyDictionary[Any, dict[tuple[str, Any, int], str]] = WeakKeyDictionary()
# Steps of tokenizers that keep all of a text, or make it longer.
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "Prepend", "Split", "NFC")
# Normal form C of a character has at least a quarter of its bytes.
_MAX_COMPOSED = 4


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
        """Whether there are tools, calls or results of calls."""
        turns = () if isinstance(self.content, str) else self.content
        is_call = any(turn["role"] == "tool" or turn.get("tool_calls") for turn in turns)
        return bool(self.tools) or is_call


def form_for(
    host: Host, adapter: RowAdapter, tool_form: PromptForm | None = None
) -> PromptForm | None:
    """The form of prompts; `tool_form` is used instead of the base model's chat template."""
    name, _ = name_and_scale(adapter)
    form = None if name is None else host.adapter(name).prompt
    has_template = form is not None and (form.chat_template or form.format == "instruction")
    if tool_form is not None and not has_template:
        return tool_form.model_copy(update={"system": None if form is None else form.system})
    if form is None or host.default_form is None or not form.is_text:
        return form or host.default_form
    return form.model_copy(update={"chat_template": host.default_form.chat_template})  # of messages


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    form: PromptForm | None = None,
    *,
    raw: bool = False,
    max_bytes: int | None = None,
) -> tuple[list[int], str | None]:
    """Token ids of a prompt, and what ends an answer; None: it continues the prompt's text.

    A text of more than `max_bytes` is an error before its tokens are made.
    """
    # It is written as an adapter's training data was. Without a form, a text is the user's turn in
    # the tokenizer's chat template where there is one, and else read as it stands, as with `raw`.
    if prompt.is_foreign:
        (content, tools), mark = mark_control_tokens(tokenizer, (prompt.content, prompt.tools))
        content = content if isinstance(content, str) else tuple(content)
        marked = replace(prompt, content=content, tools=tools, is_foreign=False)
        ids, turn_end = encode_prompt(tokenizer, marked, form, raw=raw)
        return drop_marks(tokenizer, ids, mark) if mark else ids, turn_end
    content, more = prompt.content, prompt.fields.get("input")
    if more and isinstance(content, str) and not (raw or (form and form.format == "instruction")):
        content += f"\n\n{more}"  # which only a prompt template has a place for
    has_turns = tokenizer.chat_template if form is None else not form.is_text
    if prompt.last_alone and not isinstance(content, str) and (raw or not has_turns):
        content = content[-1]["content"]
    turns = [{"role": "user", "content": content}] if isinstance(content, str) else content
    messages = [{**turn, "content": turn.get("content") or ""} for turn in turns]
    is_given = any(message["role"] in ("system", "developer") for message in messages)
    if form is not None and form.system is not None and not is_given:
        messages.insert(0, {"role": "system", "content": form.system})
    for message in messages:
        try:
            message["content"].encode()
        except UnicodeEncodeError:
            raise DataError(
                f"{prompt.origin}: the prompt must be a text of Unicode, got half a surrogate pair "
                f"in {shown(message['content'])}; write it in UTF-8"
            ) from None
    text = None  # of a prompt that needs no chat template
    if raw and (prompt.tools or not isinstance(content, str)):
        raise DataError(f"{prompt.origin}: messages and tools require a template; remove raw")
    if raw or not (form or tokenizer.chat_template or prompt.tools):
        text = content if isinstance(content, str) else None
    elif form is not None and form.format == "instruction":
        text = _render_instructions(tokenizer, messages, prompt, form)
    elif form is not None and form.is_text and len(messages) == 1 and not prompt.tools:
        text = messages[0]["content"] if messages[0]["role"] == "user" else None
    turn_end = None
    if text is not None:
        _check_size(text, max_bytes)
        ids = encode_texts(tokenizer, [text])[0]
    else:
        source = None if form is None else form.chat_template  # files name no file of ours
        try:
            template = ChatTemplate(tokenizer, source or None)
            conversation, turn_end = Conversation(messages, prompt.tools), _turn_end(template)
            chat = template.render(conversation, for_answer=True)
            _check_tools(template, conversation)
        except DataError as error:
            raise DataError(f"{prompt.origin}: {error}") from None
        except TemplateError as error:
            raise DataError(
                f"{prompt.origin}: the chat template rejects the messages: {error}"
            ) from error
        _check_size(chat, max_bytes)
        ids = tokenizer(chat, add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise DataError(f"{prompt.origin}: the prompt must not be empty")
    return ids, turn_end


def _turn_end(template: ChatTemplate) -> str:
    tokenizer = template.tokenizer
    key = (template.source(), tokenizer.eos_token, len(tokenizer))
    ends = _TURN_ENDS.setdefault(tokenizer, {})
    if key not in ends:
        ends[key] = template.turn_end()
    return ends[key]


def _check_tools(template: ChatTemplate, conversation: Conversation) -> None:
    """Refuse a conversation whose tools, or calls of them, the chat template leaves out."""
    omissions = [*omitted_tools(conversation)]
    written = ""
    if omissions:  # nearly always one text shows that all are there
        with suppress(TemplateError):
            written = template.render(_marked(conversation))
    for number, (what, _, without) in enumerate(omissions):
        if f"{_MARK}{number}-" in written:
            continue
        with suppress(TemplateError):
            if template.render(conversation) == template.render(without):
                raise DataError(
                    f"the chat template drops {what}; serve with --tool-template hermes, or use "
                    "another chat template"
                )


def _marked(conversation: Conversation) -> Conversation:
    """Put a mark into the first name of the tools and of each message's calls, in their order."""
    groups = [conversation.tools] if conversation.tools else []
    marked = conversation._replace(messages=[{**message} for message in conversation.messages])
    calling = [message for message in marked.messages if message.get("tool_calls")]
    groups += [message["tool_calls"] for message in calling]
    changed = []
    for number, (first, *others) in enumerate(groups):
        function = first.get("function")
        if isinstance(function, dict):
            name = f"{_MARK}{number}-{function.get('name')}"
            first = {**first, "function": {**function, "name": name}}
        changed.append([first, *others])
    if conversation.tools:
        marked = marked._replace(tools=changed.pop(0))
    for message, calls in zip(calling, changed, strict=True):
        message["tool_calls"] = calls
    return marked


def max_text_bytes(tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> int | None:
    """Bytes that no text of so many tokens exceeds; None if a token may stand for any number."""
    if not tokenizer.is_fast:
        return None
    written = json.loads(tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    model = written["model"]
    steps = [*_steps(written["normalizer"]), *_steps(written["pre_tokenizer"])]
    kinds = {step["type"] for step in steps}
    added = written["added_tokens"]
    all_bytes = {*pre_tokenizers.ByteLevel.alphabet()}
    if "ByteLevel" not in kinds:
        all_bytes = {f"<0x{byte:02X}>" for byte in range(256)}
    is_complete = "ByteLevel" in kinds or model.get("byte_fallback")
    has_all_bytes = model["type"] == "BPE" and is_complete and all_bytes <= model["vocab"].keys()
    strips = any(token["lstrip"] or token["rstrip"] for token in added)
    if not has_all_bytes or strips or not all(map(_keeps_bytes, steps)):
        return None
    texts = [*model["vocab"], *(token["content"] for token in added)]
    longest = max(len(text.encode()) for text in texts)
    return max_tokens * longest * (_MAX_COMPOSED if "NFC" in kinds else 1)


def _steps(step: dict[str, Any] | None) -> list[dict[str, Any]]:
    """A normalizer's or pre-tokenizer's steps, if it is a sequence of them."""
    if step is None:
        return []
    inner = step.get("normalizers") or step.get("pretokenizers")
    return [step] if inner is None else [leaf for child in inner for leaf in _steps(child)]


def _keeps_bytes(step: dict[str, Any]) -> bool:
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        return pattern is not None and len(step["content"].encode()) >= len(pattern.encode())
    return step["type"] in _KEEPING and step.get("behavior") != "Removed"


def _check_size(text: str, max_bytes: int | None) -> None:
    num_bytes = len(text.encode())
    if max_bytes is not None and num_bytes > max_bytes:
        raise RequestError(
            f"the prompt has {num_bytes:,} bytes, more than fit the model's context; shorten the "
            "prompt",
            "context_length_exceeded",
        )


def encode_for_choice(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    raw: bool = False,
    max_bytes: int | None = None,
    tool_form: PromptForm | None = None,
) -> list[int]:
    """Token ids by which a router chooses what answers a prompt."""
    name, _ = name_and_scale(prompt.adapter)
    if not raw and name is not None and host.adapter(name).forms_differ:
        content = prompt.content
        turns = [content] if isinstance(content, str) else [one.get("content") for one in content]
        texts = map(str, filter(None, [*turns, prompt.fields.get("input")]))
        prompt, raw = replace(prompt, content="\n".join(texts), tools=None), True
    form = form_for(host, prompt.adapter, tool_form if prompt.uses_tools else None)
    return encode_prompt(tokenizer, prompt, form, raw=raw, max_bytes=max_bytes)[0]


def read_prompts(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    form: PromptForm | None = None,
    *,
    raw: bool = False,
    tool_form: PromptForm | None = None,
) -> list[tuple[list[int], str | None, Choice]]:
    """Choose what answers prompts, and encode them in its form, or one that is given."""
    encode = partial(encode_for_choice, host, tokenizer, raw=raw, tool_form=tool_form)
    # none are needed where nothing is chosen
    ids = [encode(prompt) if is_routed(host, prompt.adapter) else [] for prompt in prompts]
    choices = host.choose(ids, [prompt.adapter for prompt in prompts])
    forms = [
        form or form_for(host, choice.adapter, tool_form if prompt.uses_tools else None)
        for prompt, choice in zip(prompts, choices, strict=True)
    ]
    return [
        (*encode_prompt(tokenizer, prompt, own, raw=raw), choice)
        for prompt, own, choice in zip(prompts, forms, choices, strict=True)
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
    written, system, space = "", "", ""
    given = prompt.fields.get("input")  # null is none, as in training
    fields = {**prompt.fields, "input": "" if given is None else given}
    for message in messages:
        if message["role"] == "assistant":
            before = space if message["content"][:1].strip() else ""
            written += f"{before}{message['content']}{tokenizer.eos_token or ''}"
            space = ""
        elif message["role"] == "user":
            fields["instruction"] = system + message["content"]
            try:
                asked, system = render(template, fields), ""
            except TemplateError as error:
                raise DataError(
                    f"{prompt.origin}: the prompt template can't be filled in: {error}; "
                    "pass rows with this field (--input), or use the prompt as written (--raw)"
                ) from error
            written += asked.rstrip(" ")
            space = asked[len(asked.rstrip(" ")) :]
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
