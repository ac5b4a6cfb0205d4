"""`loraloom generate`: completions of one prompt or of a file of prompts."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import Field

from loraloom.cli.completions import OutputFile, labelled, print_answers, print_rows
from loraloom.cli.options import BASE, HostOptions, LocalPath, Text, tell_unknown_prompts
from loraloom.data.chat import read_messages, read_tools
from loraloom.data.encoding import given_form
from loraloom.data.sources import Row, read_rows
from loraloom.data.templates import template_source, template_text
from loraloom.errors import ConfigError, shown
from loraloom.eval.cache import describe_adapters
from loraloom.generation.generate import complete_in_order
from loraloom.generation.loading import check_sources, load_host
from loraloom.generation.prompts import Prompt
from loraloom.generation.sampling import SamplingConfig
from loraloom.models.layout import RowAdapter


class GenerateOptions(HostOptions):
    """What is asked, how prompts are written, and where completions go."""

    prompt: Text | None = None
    """A prompt; base model and adapters answer it."""
    input: LocalPath | None = None
    """FILE.jsonl with a row for each prompt: `prompt` or `messages` (and `tools`), perhaps
    `adapter`."""
    output: LocalPath | None = None
    """Write the rows to FILE.jsonl as they are done, with `completion` and `adapter`. Rows that are
    there already are skipped."""
    overwrite: bool = False
    """Begin --output anew, whatever is there."""
    no_base: bool = False
    """Let the adapters alone answer --prompt."""
    raw: bool = False
    """Read prompts as they stand, without a template."""
    template: Text | None = None
    """Write prompts in this prompt template: alpaca, plain, a Jinja text or a file."""
    chat_template: Text | None = None
    """Write prompts in this chat template: a file, a Jinja text, or trl for its training one."""
    batch_size: int = Field(default=16, ge=1)
    """Complete at most N prompts at once."""

    def check(self) -> None:
        """Raise a ConfigError for options that don't go together."""
        ways = {
            "--chat-template": self.chat_template,
            "--template": self.template,
            "--raw": self.raw or None,
        }
        given = [option for option, value in ways.items() if value is not None]
        if len(given) > 1:
            raise ConfigError(f"{given[0]} has no effect with {given[1]}; leave one of them out")
        if self.overwrite and self.output is None:
            raise ConfigError("--overwrite has no effect without --output; leave it out")
        if (self.prompt is None) == (self.input is None):
            raise ConfigError("generate needs either --prompt or --input; give one of them")
        if self.no_base and (self.input is not None or not self.adapters):
            raise ConfigError(
                "--no-base has an effect on --prompt with --adapter only; leave it out"
            )
        if self.output and self.input and self.output.resolve() == self.input.resolve():
            raise ConfigError(
                f"--output must be another file than --input, got {self.output} twice"
            )

    def settings(self, sampling: SamplingConfig) -> dict[str, Any]:
        """What the completions depend on, as JSON values."""
        settings: dict[str, Any] = {
            "base_model": self.base_model,
            "dtype": self.dtype,
            "sampling": sampling.model_dump(),
            "raw": self.raw,
            "batch_size": self.batch_size,
            "adapters": describe_adapters(self.adapters),
        }
        if self.chat_template is not None:
            settings["chat_template"] = template_text(self.chat_template)
        if self.template is not None:
            settings["template"] = template_source(self.template)
        if self.quantization is not None:
            settings["quantization"] = self.quantization.model_dump()
        return settings


def generate(
    options: Annotated[GenerateOptions, Parameter(name="*")],
    sampling: Annotated[SamplingConfig, Parameter(name="*")] = SamplingConfig(),
) -> None:
    """Complete a prompt, or every prompt of a file, with the base model or adapters on it.

    Each adapter reads prompts as its training data wrote them, the base model in its chat template.
    --raw, --template and --chat-template are for all of them.

    After Ctrl-C the same command goes on behind the rows that --output has.
    """
    options.check()
    rows, prompts = _read(options)
    check_sources(options, options.adapters)
    num_done, file = 0, None
    if options.output is not None:
        lines = [*labelled(rows, prompts)]
        file = OutputFile(options.output, lines, options.settings(sampling))
        num_done = file.count_done(options.batch_size, overwrite=options.overwrite)
    if num_done == len(rows):
        print(f"all {num_done} rows are in {options.output} already", file=sys.stderr)
        return
    host, tokenizer = load_host(options, options.adapters)
    form = given_form(tokenizer, options.template, options.chat_template)
    if form is None and not options.raw:
        tell_unknown_prompts(host, tokenizer)
    batches = complete_in_order(
        host,
        tokenizer,
        prompts,
        sampling,
        batch_size=options.batch_size,
        num_done=num_done,
        raw=options.raw,
        prompt_form=form,
    )
    texts = ([completion.text for completion in batch] for batch in batches)
    if file is not None:
        file.write(texts, num_done)
    elif options.input is None:
        print_answers(prompts, texts)
    else:
        print_rows([*labelled(rows, prompts)], texts)


def _read(options: GenerateOptions) -> tuple[list[dict[str, Any]], list[Prompt]]:
    """Rows to write again, and their prompts."""
    if options.input is None:
        names = [*([] if options.no_base else [None]), *options.adapters]
        return [{"prompt": options.prompt}] * len(names), [
            Prompt(str(options.prompt), name, origin="--prompt") for name in names
        ]
    asked = [
        (dict(row), prompt)
        for row in read_rows(options.input)
        for prompt in _prompts_of(row, options.adapters, raw=options.raw)
    ]
    return [row for row, _ in asked], [prompt for _, prompt in asked]


def _prompts_of(row: Row, adapters: Mapping[str, str], *, raw: bool) -> list[Prompt]:
    """What a row asks: one adapter, or all of them where it names none."""
    if ("prompt" in row) == ("messages" in row):
        row.reject("a row must have either 'prompt' or 'messages'")
    if raw and "messages" in row:
        row.reject("--raw has no effect on 'messages', which need a chat template; give 'prompt'")
    tools = None
    if "prompt" in row:
        content = row.text("prompt")
    else:
        content, tools = tuple(read_messages(row, "messages")), read_tools(row, "tools")
    wanted: list[RowAdapter] = (
        [_adapter_of(row, adapters)] if "adapter" in row else list(adapters) or [None]
    )
    fields = {name: value for name, value in row.items() if name != "prompt"}
    return [Prompt(content, adapter, row.origin, tools, fields) for adapter in wanted]


def _adapter_of(row: Row, adapters: Mapping[str, str]) -> RowAdapter:
    """The adapter that a row asks for, perhaps with a scale."""
    match row["adapter"]:
        case None | "base":
            return None
        case str(name):
            scale = 1.0
        case [str(name), int(scale) | float(scale)] if math.isfinite(scale):
            pass
        case other:
            row.reject(f"field 'adapter' must be a name or [name, scale], got {shown(other)}")
    if name not in adapters:
        known = ", ".join([BASE, *adapters])
        row.reject(
            f"field 'adapter' must be one of {known}, got {shown(name)}; give --adapter for it"
        )
    return name if scale == 1 else (name, scale)
