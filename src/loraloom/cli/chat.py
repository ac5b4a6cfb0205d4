"""`loraloom chat`: talk to the base model and its adapters in the terminal."""

from __future__ import annotations

import contextlib
import math
import secrets
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from loraloom.cli.generate import BASE
from loraloom.cli.options import (
    AdapterOption,
    AttnOption,
    BaseModelOption,
    DeviceOption,
    DtypeOption,
    QuantizationOption,
    parse_adapters,
    tell_unknown_prompts,
)
from loraloom.cli.serve import CacheTokensOption
from loraloom.errors import ConfigError, LoraloomError, plain, shown

if TYPE_CHECKING:
    from loraloom.generation.conversation import Conversation
    from loraloom.generation.sampling import SamplingConfig

HELP = """\
/adapter NAME      let an adapter answer, or `base`
/compare NAME ...  let several answer each message
/reset             forget what was said
/help              show this
/quit              end, as does Ctrl-D; Ctrl-C cuts an answer short"""


def chat(
    base_model: BaseModelOption,
    adapter: AdapterOption = None,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", help="The system message, in place of those that adapters were trained on."
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Read each message as it stands, without a template.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Most tokens of an answer.")
    ] = 512,
    temperature: Annotated[
        float, typer.Option("--temperature", help="0 takes the most likely token; above, draws.")
    ] = 0.7,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the most likely tokens of this share.")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: say less again.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of the draws; by default another each time.")
    ] = None,
    cache_tokens: CacheTokensOption = None,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    device: DeviceOption = "auto",
    attn_implementation: AttnOption = None,
) -> None:
    """Talk to the base model and its adapters; /help says how to switch between them.

    Each adapter reads messages as its training data wrote prompts, the base model in its chat
    template.
    """
    adapters = parse_adapters(adapter)
    if raw and system is not None:
        raise ConfigError("--system has no effect with --raw; leave one of them out")
    from loraloom.generation.conversation import Conversation
    from loraloom.generation.engine import Engine
    from loraloom.generation.limits import EngineLimits
    from loraloom.generation.loading import check_sources, load_host
    from loraloom.generation.memory import default_cache_tokens
    from loraloom.generation.sampling import parse_sampling

    sampling = parse_sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=secrets.randbits(63) if seed is None else seed,
    )
    check_sources(base_model, adapters, device, dtype, quantization)
    host, tokenizer = load_host(
        base_model, adapters, dtype, device, attn_implementation, quantization
    )
    have_turns = [one.prompt and not one.prompt.is_text for one in host.adapters.values()]
    if system and not tokenizer.chat_template and not any(have_turns):
        raise ConfigError(
            "--system needs a chat template, the base model's tokenizer has none; leave it out"
        )
    if not raw:
        tell_unknown_prompts(host, tokenizer)
    max_rows = len(adapters) + 1
    cache_tokens = cache_tokens or default_cache_tokens(host, max_rows)
    limits = EngineLimits(max_rows, cache_tokens, max_request_s=math.inf)
    engine = Engine(host, tokenizer, limits)
    conversation = Conversation(engine, tokenizer, BASE, system, raw=raw)
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
        typer.echo(f"models: {', '.join(self._known)}; /help for commands")
        while (line := _read_line(f"{' '.join(self._models)}> ")) is not None:
            try:
                if self._handle(line.strip()):
                    return
            except LoraloomError as error:
                typer.echo(f"error: {error}")

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
                typer.echo(HELP)
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
                    typer.echo(f"{'' if answering is None else chr(10)}[{model}]")
                answering = model
                typer.echo(_printed(piece), nl=False)
        except KeyboardInterrupt:
            pass
        finally:
            answers.close()  # pyright: ignore[reportAttributeAccessIssue]
            typer.echo()


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
        typer.echo()
        return None
