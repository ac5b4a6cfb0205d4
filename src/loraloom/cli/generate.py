"""`loraloom generate`: completions of one prompt or of a file of prompts.

An --output is at any time the beginning of what it will be, so an interrupted command goes on where
it was. What its texts depend on stands in a file beside it, `FILE.settings.json`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import Field
from typing_extensions import override

from loraloom.cli.options import BASE, HostOptions, LocalPath, Text, tell_unknown_prompts
from loraloom.config.text import read_json
from loraloom.data.chat import read_messages, read_tools
from loraloom.data.encoding import given_form
from loraloom.data.sources import Row, read_rows
from loraloom.data.templates import template_source, template_text
from loraloom.durable import append_text, prepare_output, write_json
from loraloom.errors import ConfigError, shown
from loraloom.eval.cache import describe_adapters
from loraloom.generation.generate import complete_in_order
from loraloom.generation.loading import check_sources, load_host
from loraloom.generation.prompts import Prompt
from loraloom.generation.sampling import SamplingConfig
from loraloom.models.layout import RowAdapter
from loraloom.terminal import make_console, show_progress

Rows = Sequence[dict[str, Any]]
_DECISIVE = {"base_model", "dtype", "quantization", "raw", "batch_size"}


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

    @override
    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        forms = {
            "--chat-template": self.chat_template,
            "--template": self.template,
            "--raw": self.raw or None,
        }
        given = [option for option, value in forms.items() if value is not None]
        if len(given) > 1:
            yield f"{given[0]} has no effect with {given[1]}; leave one of them out"
        if self.overwrite and self.output is None:
            yield "--overwrite has no effect without --output; leave it out"
        if (self.prompt is None) == (self.input is None):
            yield "generate needs either --prompt or --input; give one of them"
        elif self.no_base and (self.input is not None or not self.adapter):
            yield "--no-base has an effect on --prompt with --adapter only; leave it out"
        if self.output and self.input and self.output.resolve() == self.input.resolve():
            yield f"--output must be another file than --input, got {self.output} twice"

    def settings(self, sampling: SamplingConfig, rows: Rows) -> dict[str, Any]:
        """What the completions depend on, as JSON values."""
        # rows by their hash: the file beside the output stays small
        text = json.dumps(rows, sort_keys=True)
        return {
            **self.model_dump(include=_DECISIVE, mode="json"),
            "sampling": sampling.model_dump(mode="json"),
            "adapters": describe_adapters(self.adapters),
            "input": hashlib.sha256(text.encode()).hexdigest(),
            "chat_template": self.chat_template and template_text(self.chat_template),
            "template": self.template and template_source(self.template),
        }


def generate(
    *,
    options: Annotated[GenerateOptions, Parameter(name="*")],
    sampling: Annotated[SamplingConfig, Parameter(name="*")] = SamplingConfig(),
) -> None:
    """Complete a prompt, or every prompt of a file, with the base model or adapters on it.

    Each adapter reads prompts as its training data wrote them, the base model in its chat template.
    --raw, --template and --chat-template are for all of them.

    After Ctrl-C the same command goes on behind the rows that --output has.
    """
    asked = list(_read(options))
    prompts = [prompt for _, prompt in asked]
    rows = [{**row, "adapter": prompt.adapter or BASE} for row, prompt in asked]
    check_sources(options, options.adapters)
    num_done, settings = 0, dict[str, Any]()
    if options.output is not None:
        settings = options.settings(sampling, rows)
        num_done = _count_done(options, len(rows), settings)
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
    if options.output is not None:
        _write(options.output, rows, settings, texts, num_done)
        return
    for row, text in zip(rows, chain.from_iterable(texts), strict=True):
        if options.input is not None:
            print(_line(row, text), end="", flush=True)
        else:
            print(f"[{row['adapter']}]\n{text}" if len(rows) > 1 else text)


def _read(options: GenerateOptions) -> Iterator[tuple[Mapping[str, Any], Prompt]]:
    if options.input is None:
        for name in [*([] if options.no_base else [None]), *options.adapters]:
            yield {"prompt": options.prompt}, Prompt(str(options.prompt), name, origin="--prompt")
        return
    for row in read_rows(options.input):
        if ("prompt" in row) == ("messages" in row):
            row.reject("a row must have either 'prompt' or 'messages'")
        if "prompt" in row:
            content, tools = row.text("prompt"), None
        elif options.raw:
            row.reject(
                "--raw has no effect on 'messages', which need a chat template; give 'prompt'"
            )
        else:
            content, tools = tuple(read_messages(row, "messages")), read_tools(row, "tools")
        adapters = options.adapters
        wanted = [_adapter_of(row, adapters)] if "adapter" in row else list(adapters) or [None]
        fields = {name: value for name, value in row.items() if name != "prompt"}
        for adapter in wanted:
            yield dict(row), Prompt(content, adapter, row.origin, tools, fields)


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


def _count_done(options: GenerateOptions, num_rows: int, settings: Mapping[str, Any]) -> int:
    # nothing is changed here, as the base model, which is loaded next, may not fit
    path = options.output
    prepare_output(path, "--output")
    if options.overwrite or path is None or not path.exists():
        return 0
    try:
        known = read_json(_settings_path(path))
        others = [name for name in {**known, **settings} if known.get(name) != settings.get(name)]
    except (ConfigError, TypeError):
        others = ["command"]
    if others:
        raise ConfigError(
            f"--output {path} must be new or what the same command has begun, but its texts were "
            f"generated with another {others[0]}; give another file, or --overwrite"
        )
    num_done = path.read_bytes().count(b"\n")
    # a batch that was not finished is begun anew: its rows' texts may depend on the batch's shape
    is_complete = num_done == num_rows
    return num_done if is_complete else num_done // options.batch_size * options.batch_size


def _write(
    path: Path,
    rows: Rows,
    settings: Mapping[str, Any],
    texts: Iterable[Sequence[str]],
    num_done: int,
) -> None:
    """Append rows as they are done, and show how it gets on."""
    messages = make_console(stderr=True, soft_wrap=True)
    try:
        if num_done:
            kept = path.read_bytes().split(b"\n")[:num_done]
            os.truncate(path, sum(map(len, kept)) + num_done)
        else:
            path.unlink(missing_ok=True)
            write_json(_settings_path(path), settings)
            append_text(path, "")
        with show_progress(messages, path.name, [1] * len(rows)) as advance:
            advance(range(num_done))
            for batch in texts:
                done = range(num_done, num_done + len(batch))
                append_text(path, "".join(map(_line, [rows[place] for place in done], batch)))
                advance(done)
                num_done = done.stop
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error}") from error
    except KeyboardInterrupt:
        messages.print(
            f"stopped; {num_done} of {len(rows)} rows are kept in {path}, the same command goes on "
            "from there"
        )
        raise


def _settings_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.settings.json")


def _line(row: Mapping[str, Any], text: str) -> str:
    return json.dumps({**row, "completion": text}, ensure_ascii=False) + "\n"
