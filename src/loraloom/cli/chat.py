"""`loraloom chat`: talk to the base model and its adapters in the terminal."""

from __future__ import annotations

import contextlib
import math
import secrets
import unicodedata
from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter
from pydantic import Field

from loraloom.cli.options import BASE, HostOptions, Text, tell_unknown_prompts
from loraloom.config.fields import checked
from loraloom.errors import ConfigError, LoraloomError, plain, shown
from loraloom.generation.engine import Engine
from loraloom.generation.generate import Conversation
from loraloom.generation.loading import check_sources, default_cache_tokens, load_host
from loraloom.generation.sampling import SamplingConfig
from loraloom.generation.scheduler import EngineLimits

HELP = """\
/adapter NAME      let an adapter answer, or `base`
/compare NAME ...  let several answer each message
/reset             forget what was said
/help              show this
/quit              end, as does Ctrl-D; Ctrl-C cuts an answer short"""


class ChatOptions(HostOptions):
    """Who is talked to, and how tokens are chosen."""

    system: Text | None = None
    """The system message, in place of those that adapters were trained on."""
    raw: bool = False
    """Read each message as it stands, without a template."""
    max_new_tokens: int = 512
    """Generate at most N tokens for an answer."""
    temperature: float = 0.7
    """0 takes the most likely token; from 0.001, tokens are drawn."""
    top_p: float = 1.0
    """Draw from the most likely tokens whose probabilities sum to this."""
    repetition_penalty: float = 1.0
    """Above 1: repeat less."""
    seed: int | None = None
    """Seed of the random draws; by default another one each time."""
    cache_tokens: int | None = Field(default=None, ge=32)
    """Tokens of the key-value cache. By default all rows at full length, as far as a quarter of the
    free memory goes."""


def chat(options: Annotated[ChatOptions, Parameter(name="*")]) -> None:
    """Talk to the base model and its adapters; /help says how to switch between them.

    Each adapter reads messages as its training data wrote prompts, the base model in its chat
    template.
    """
    adapters, system, raw = options.adapters, options.system, options.raw
    if raw and system is not None:
        raise ConfigError("--system has no effect with --raw; leave one of them out")
    settings = options.model_dump(include=set(SamplingConfig.model_fields))
    if options.seed is None:
        settings["seed"] = secrets.randbits(63)
    sampling = checked(SamplingConfig, settings)
    check_sources(options, adapters)
    host, tokenizer = load_host(options, adapters)
    have_turns = [one.prompt and not one.prompt.is_text for one in host.adapters.values()]
    if system and not tokenizer.chat_template and not any(have_turns):
        raise ConfigError(
            "--system needs a chat template, the base model's tokenizer has none; leave it out"
        )
    if not raw:
        tell_unknown_prompts(host, tokenizer)
    max_rows = len(adapters) + 1
    cache_tokens = options.cache_tokens or default_cache_tokens(host, max_rows)
    limits = EngineLimits(max_rows, cache_tokens, max_request_s=math.inf)
    conversation = Conversation(Engine(host, tokenizer, limits), tokenizer, BASE, system, raw=raw)
    Terminal(conversation, [BASE, *adapters], sampling).run()


class Terminal:
    """Reads lines, and does what they say."""

    def __init__(self, conversation: Conversation, models: Sequence[str], sampling: SamplingConfig):
        self._conversation = conversation
        self._known = list(models)
        self._models = self._known[-1:]
        self._sampling = sampling

    def run(self) -> None:
        """Go on until the input ends, or /quit."""
        print(f"models: {', '.join(self._known)}; /help for commands")
        while (line := _read_line(f"{' '.join(self._models)}> ")) is not None:
            try:
                if self._handle(line.strip()):
                    return
            except LoraloomError as error:
                print(f"error: {error}")

    def _handle(self, line: str) -> bool:
        """Do what a line says; return whether it ends the conversation."""
        command, *words = line.split() if line.startswith("/") else [""]
        match command:
            case "":
                if line:
                    self._answer(line)
            case "/adapter":
                self._choose(words, most=1)
            case "/compare":
                self._choose(words, most=len(self._known))
            case "/reset":
                self._conversation.turns.clear()
            case "/help":
                print(HELP)
            case "/quit" | "/exit":
                return True
            case _:
                raise ConfigError(f"there is no command {shown(command)}; /help names them")
        return False

    def _choose(self, names: Sequence[str], most: int) -> None:
        known = ", ".join(self._known)
        unknown = [name for name in names if name not in self._known]
        if unknown or not 1 <= len(set(names)) == len(names) <= most:
            count = "one" if most == 1 else f"1 to {most} different ones"
            raise ConfigError(f"name {count} of {known}, got {shown(' '.join(names))}")
        self._models = list(names)

    def _answer(self, text: str) -> None:
        """Print the answers as they come."""
        answering = None
        answers = self._conversation.ask(text, self._models, self._sampling)
        try:
            for model, piece in answers:
                if model != answering and len(self._models) > 1:
                    print(f"{'' if answering is None else chr(10)}[{model}]")
                answering = model
                print(_printed(piece), end="", flush=True)
        except KeyboardInterrupt:
            pass
        finally:
            answers.close()  # pyright: ignore[reportAttributeAccessIssue]
            print()


def _printed(text: str) -> str:
    """An answer with its spaces and joiners, but without what would steer the terminal."""
    joiners = "\t\u200c\u200d"
    return "".join(c if c in joiners or unicodedata.category(c) == "Zs" else plain(c) for c in text)


def _read_line(prompt: str) -> str | None:
    """A line of the input; None at its end."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited and called back)
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        return None
