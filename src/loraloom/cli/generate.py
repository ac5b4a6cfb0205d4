"""`loraloom generate`: completions of one prompt or of a file of prompts."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import Field
from typing_extensions import override

from loraloom.adapters.weighted_sum import is_sum
from loraloom.atomic_io import append_text, cut_torn_line, prepare_output
from loraloom.cli.options import BASE, HostOptions, Section, Text, is_derived, tell_unknown_prompts
from loraloom.config.text import local_path, parse_json
from loraloom.data.chat import read_messages, read_tools
from loraloom.data.encoding import given_form
from loraloom.data.sources import Row, read_rows
from loraloom.errors import ConfigError, DataError, LoraloomError, shown
from loraloom.formats.files import read_adapters
from loraloom.generation.generate import complete, make_requests
from loraloom.generation.loading import load_host
from loraloom.generation.prompts import Prompt
from loraloom.generation.sampling import SamplingConfig
from loraloom.host.choice import describe_choice
from loraloom.host.layout import RowAdapter
from loraloom.terminal import make_console, printed, show_progress

Rows = Sequence[dict[str, Any]]


class GenerateOptions(HostOptions):
    """What is asked, how prompts are written, and where completions go."""

    prompt: Annotated[Text | None, Section.DATA] = None
    """Complete this prompt with the base model and each adapter."""
    input: Annotated[Path | None, Section.DATA] = None
    """Complete rows of FILE.jsonl: `prompt` or `messages`; `tools`, `adapter`."""
    raw: Annotated[bool, Section.DATA] = False
    """Use prompts as written, without a template."""
    template: Annotated[Text | None, Section.DATA] = None
    """Use this prompt template: alpaca, plain, a Jinja string or a file."""
    chat_template: Annotated[Text | None, Section.DATA] = None
    """Use this chat template: a file, a Jinja string, or hermes for ChatML with tools."""
    output: Annotated[Path | None, Section.RESULTS] = None
    """Append rows to FILE.jsonl with `completion`, `adapter` and a router's `chosen`."""
    resume: Annotated[bool, Section.RESULTS] = False
    """Continue an --output that the same command started."""
    no_base: Annotated[bool, Section.RESULTS] = False
    """Skip the base model for --prompt."""
    batch_size: Annotated[int, Section.DATA] = Field(default=16, ge=1)
    """Complete at most N prompts at once."""

    @override
    def contradictions(self) -> Iterator[str]:
        if len({"raw", "template", "chat_template"} & self.model_fields_set) > 1:
            yield "--raw, --template and --chat-template exclude each other; pass only one option"
        if (self.prompt is None) == (self.input is None):
            yield "generate requires either --prompt or --input"
        elif self.no_base and self.input is not None:
            yield (
                "--no-base requires --prompt: of --input, the base model completes only rows that "
                "name it, if there are adapters; remove --no-base"
            )
        elif self.no_base and not self.adapter:
            yield "--no-base requires --adapter NAME=PATH"
        if self.resume and self.output is None:
            yield "--resume requires --output FILE.jsonl"


def generate(
    *,
    options: Annotated[GenerateOptions, Parameter(name="*"), Section.MODEL],
    sampling: Annotated[SamplingConfig, Parameter(name="*"), Section.SAMPLING] = SamplingConfig(),
) -> None:
    """Complete a prompt, or every prompt of a file, with the base model and its adapters.

    Each adapter uses the prompt form of its training data, the base model its chat template.
    --raw, --template and --chat-template apply to all models.
    """
    rows, prompts = zip(*_read(options), strict=True)
    num_done = _count_done(options, rows)
    host, tokenizer = load_host(options, read_adapters(options.adapters))
    form = given_form(tokenizer, options.template, options.chat_template)
    if form is None and not options.raw:
        tell_unknown_prompts(host, tokenizer)
    requests = make_requests(host, tokenizer, prompts, sampling, raw=options.raw, prompt_form=form)
    size = options.batch_size
    messages = make_console(stderr=True, soft_wrap=True, quiet=options.output is None)
    num_rows = len(rows)
    with show_progress(messages, "rows", [1] * num_rows) as advance:
        advance(range(num_done))
        for start in range(num_done, num_rows, size):
            stop = min(start + size, num_rows)
            batch = complete(host, tokenizer, requests[start:stop], batch_size=size)
            text = ""
            for row, answer in zip(rows[start:stop], batch, strict=True):
                choice = describe_choice(answer.choice, tokenizer)
                completed = {**row, "completion": answer.text, **choice}
                text += _format_row(completed, options, has_name=num_rows > 1)
            if options.output is not None:
                append_text(options.output, text)
            elif sys.stdout.isatty():
                print(printed(text), end="", flush=True)
            else:
                print(text, end="", flush=True)
            advance(range(start, stop))


def _format_row(row: Mapping[str, Any], options: GenerateOptions, *, has_name: bool) -> str:
    if options.input is not None or options.output is not None:
        return f"{json.dumps(row, ensure_ascii=False)}\n"
    name = f"[{row['adapter']}]\n" if has_name else ""
    return f"{name}{row['completion']}\n"


def _read(options: GenerateOptions) -> Iterator[tuple[dict[str, Any], Prompt]]:
    if options.input is None:
        for name in options.names if options.no_base else [None, *options.names]:
            row = {"prompt": options.prompt, "adapter": name or BASE}
            yield row, Prompt(str(options.prompt), name, origin="--prompt")
        return
    answering = options.names or [None]
    for row in read_rows(local_path(options.input, "a data file", DataError)):
        # tables put a null where a row lacks a field of others
        is_plain = row.get("prompt") is not None
        if is_plain == (row.get("messages") is not None):
            row.reject("a row must have either 'prompt' or 'messages', not both or neither")
        tools = read_tools(row, "tools")
        content = row.text("prompt") if is_plain else tuple(read_messages(row, "messages"))
        adapters = answering if row.get("adapter") is None else [_adapter_of(row, options)]
        fields = {name: value for name, value in row.items() if name != "prompt"}
        for adapter in adapters:
            name = list(adapter) if isinstance(adapter, tuple) else adapter or BASE
            yield {**row, "adapter": name}, Prompt(content, adapter, row.origin, tools, fields)


def _adapter_of(row: Row, options: GenerateOptions) -> RowAdapter:
    adapters = options.adapters
    match row["adapter"]:
        case "base":
            return None
        case str(name) if name in adapters:
            return name
        case [str(name), int(scale) | float(scale)] if (
            name.partition("/")[0] in adapters and not is_sum(name) and abs(scale) < 1e6
        ):
            return name, float(scale)
        case str(name) if is_derived(name):
            try:
                return options.check_derived(name)
            except LoraloomError as error:
                row.reject(str(error))
    allowed = ", ".join([BASE, *adapters])
    got = shown(row["adapter"])
    row.reject(f"field 'adapter' must be one of {allowed}, or [name, scale], got {got}")


def _count_done(options: GenerateOptions, rows: Rows) -> int:
    path = options.output
    prepare_output(path, "--output")
    if path is None or not path.exists():
        return 0
    if not options.resume:
        raise ConfigError(f"--output {path} exists; pass --resume to continue, or delete the file")
    *lines, torn = path.read_bytes().split(b"\n")
    done = [parse_json(line.decode(errors="replace"), str(path)) for line in lines]
    is_torn = torn[:1] in (b"", b"{") and torn[-1:] != b"}"
    is_ours = all(map(_is_completed, rows, done)) and len(done) <= len(rows)
    if not (is_torn and is_ours):
        raise ConfigError(f"--output {path} contains rows of another command; choose another file")
    cut_torn_line(path)
    return len(done)


def _is_completed(row: Mapping[str, Any], done: Any) -> bool:
    if not isinstance(done, dict) or "completion" not in done:
        return False
    answer = {name: done[name] for name in ("completion", "chosen") if name in done}
    return {**row, **answer} == done
