"""`loraloom chat`: talk to the base model and its adapters in the terminal."""

import contextlib
import math
import re
import secrets
from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from loraloom.cli.options import BASE, HostOptions, Section, Text, is_derived, tell_unknown_prompts
from loraloom.errors import ConfigError, LoraloomError, shown
from loraloom.formats.files import read_adapters
from loraloom.generation.engine import Engine
from loraloom.generation.generate import Conversation
from loraloom.generation.loading import default_cache_tokens, load_host
from loraloom.generation.sampling import SamplingConfig
from loraloom.generation.scheduler import EngineLimits
from loraloom.host.host import Host
from loraloom.terminal import printed

HELP = """\
/adapter NAME  answer with this adapter or `base`
/reset         start a new conversation
/quit          quit, as does Ctrl-D; Ctrl-C stops an answer
A space before a slash sends it as a message."""

# `/word` is meant as a command; `/usr/bin`, a path, is a message.
_COMMAND = re.compile(r"/\w+(\s|$)")


class ChatOptions(HostOptions):
    """Who is talked to, and how prompts are written."""

    system: Annotated[Text | None, Section.DATA] = None
    """Use this system message. Default: the one that each adapter was trained with."""


class ChatSampling(SamplingConfig):
    """How tokens are chosen, and when an answer ends."""

    max_new_tokens: int = Field(default=512, ge=1)
    """Generate at most N tokens per answer."""
    temperature: float = Field(default=0.7, ge=0)
    """Sample at this temperature; 0 always selects the most likely token."""
    seed: Annotated[int, Parameter(show_default=False)] = Field(
        default_factory=lambda: secrets.randbits(63), ge=0, lt=2**63
    )
    """Set the random seed. Default: a random seed."""


def chat(
    *,
    options: Annotated[ChatOptions, Parameter(name="*"), Section.MODEL],
    sampling: Annotated[ChatSampling, Parameter(name="*"), Section.SAMPLING] = ChatSampling(),
) -> None:
    """Chat with the base model and its adapters. Type /help to see how to switch between them.

    Each adapter uses the prompt form of its training data, the base model its chat template.
    """
    host, tokenizer = load_host(options, read_adapters(options.adapters))
    _check_system(options, host, tokenizer)
    tell_unknown_prompts(host, tokenizer)
    names = [BASE, *options.names]
    for name in options.derived:
        host.adapter(name)  # a sum or an expert: an error now if there is none
    limits = EngineLimits(
        max_rows=1,
        cache_tokens=default_cache_tokens(host, max_rows=2),  # a turn, and what is kept of others
        max_request_s=math.inf,
    )
    conversation = Conversation(Engine(host, tokenizer, limits), tokenizer, options.system)
    model = names[-1]
    print(f"models: {', '.join(names)}; /help for commands")
    while True:
        line = _read_line(f"{model}> ")
        command, _, argument = line.partition(" ")
        command = command.rstrip()
        if command == "/quit":
            return
        try:
            if command == "/adapter":
                model = _choose_model(host, names, argument.strip())
            elif command == "/reset":
                conversation.turns.clear()
            elif command == "/help":
                print(HELP)
            elif _COMMAND.match(line):
                raise ConfigError(
                    f"unknown command {command}; type /help for the commands, or put a space "
                    "before a message"
                )
            elif line.strip():
                _answer(conversation, line.strip(), model, sampling)
        except LoraloomError as error:
            print(f"error: {error}")


def _check_system(options: ChatOptions, host: Host, tokenizer: PreTrainedTokenizerBase) -> None:
    if not options.system:
        return
    has_turns = bool(tokenizer.chat_template)
    deaf = []
    for name, adapter in host.adapters.items():
        forms = [member.prompt for member in adapter.parts if member.prompt is not None]
        has_turns = has_turns or not all(form.is_text for form in forms)
        if adapter.prompt is not None and adapter.prompt.is_text:
            deaf.append(name)
    if not has_turns:
        raise ConfigError("--system requires a chat template; remove --system")
    if deaf:
        print(f"note: {', '.join(deaf)} will not see --system, as trained on texts without turns")


def _choose_model(host: Host, names: Sequence[str], name: str) -> str:
    if is_derived(name):
        host.adapter(name)  # an error if there is none
    elif name not in names:
        raise ConfigError(f"/adapter requires {' or '.join(names)}, got {shown(name)}")
    return name


def _read_line(prompt: str) -> str:
    # merely importing it lets lines be edited and called back; Windows has none
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        return "/quit"


def _answer(conversation: Conversation, text: str, model: str, sampling: SamplingConfig) -> None:
    chosen = None
    answer = conversation.ask(text, model, sampling)
    try:
        for piece in answer:
            if conversation.chosen != chosen:
                chosen = conversation.chosen
                print(f"[{model}, {chosen}]")
            print(printed(piece), end="", flush=True)
    except KeyboardInterrupt:
        pass
    finally:
        answer.close()  # ty: ignore[missing-attribute]
        print()
