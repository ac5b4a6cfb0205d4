"""`loraloom generate`: completions of one prompt or of a file of prompts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraloom.cli.options import (
    AdapterOption,
    AttnOption,
    BaseModelOption,
    ChatTemplateOption,
    DeviceOption,
    DtypeOption,
    PromptTemplateOption,
    QuantizationOption,
    parse_adapters,
    path_option,
    tell_unknown_prompts,
)
from loraloom.errors import ConfigError, shown

if TYPE_CHECKING:
    from loraloom.data.rows import Row
    from loraloom.generation.prompts import Prompt
    from loraloom.models.layout import RowAdapter

BASE = "base"
"""What files call the base model."""


def generate(
    base_model: BaseModelOption,
    adapter: AdapterOption = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="A prompt; base model and adapters answer it.")
    ] = None,
    input_file: Annotated[
        Path | None,
        path_option(
            "--input",
            metavar="FILE.jsonl",
            help="A row for each prompt: `prompt` or `messages` (and `tools`), perhaps `adapter`.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        path_option(
            "--output",
            metavar="FILE.jsonl",
            help="Write the rows there as they are done, with `completion` and `adapter`; rows "
            "that are there already are skipped.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin --output anew, whatever is there.")
    ] = False,
    no_base: Annotated[
        bool, typer.Option("--no-base", help="Let the adapters alone answer --prompt.")
    ] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Read prompts as they stand, without a template.")
    ] = False,
    template: PromptTemplateOption = None,
    chat_template: ChatTemplateOption = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", help="Most tokens of a completion.")
    ] = 128,
    temperature: Annotated[
        float,
        typer.Option("--temperature", help="0 takes the most likely token; from 0.001, draws."),
    ] = 0.0,
    top_k: Annotated[
        int, typer.Option("--top-k", help="Draw from the so many most likely tokens; 0: all.")
    ] = 0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the most likely tokens of this share.")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option("--repetition-penalty", help="Above 1: say less again.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", help="End a completion where this text appears. May be repeated."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Most prompts at once.")
    ] = 16,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    device: DeviceOption = "auto",
    attn_implementation: AttnOption = None,
) -> None:
    """Complete a prompt, or every prompt of a file, with the base model or adapters on it.

    Each adapter reads prompts as its training data wrote them, the base model in its chat template.
    --raw, --template and --chat-template are for all of them.

    After Ctrl-C the same command goes on behind the rows that --output has.
    """
    adapters = parse_adapters(adapter)
    ways = {"--chat-template": chat_template, "--template": template, "--raw": raw or None}
    given = [option for option, value in ways.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} has no effect with {given[1]}; leave one of them out")
    if overwrite and output is None:
        raise ConfigError("--overwrite has no effect without --output; leave it out")
    from loraloom.cli.completions import OutputFile, labelled, print_answers, print_rows
    from loraloom.data.chat_template import template_text
    from loraloom.data.prompts import given_form, template_source
    from loraloom.eval.provenance import describe_adapters
    from loraloom.generation.generate import complete_in_order
    from loraloom.generation.loading import check_sources, load_host
    from loraloom.generation.sampling import parse_sampling

    sampling = parse_sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    rows, prompts = _read(prompt, input_file, adapters, no_base=no_base, raw=raw)
    check_sources(base_model, adapters, device, dtype, quantization)
    num_done, file = 0, None
    if output is not None:
        if input_file is not None and output.resolve() == input_file.resolve():
            raise ConfigError(f"--output must be another file than --input, got {output} twice")
        settings = {"base_model": base_model, "dtype": dtype, "sampling": sampling.model_dump()}
        settings |= {"raw": raw, "batch_size": batch_size, "adapters": describe_adapters(adapters)}
        settings |= {"chat_template": template_text(chat_template)} if chat_template else {}
        settings |= {"template": template_source(template)} if template else {}
        settings |= {"quantization": quantization.model_dump()} if quantization else {}
        file = OutputFile(output, [*labelled(rows, prompts)], settings)
        num_done = file.count_done(batch_size, overwrite=overwrite)
    if num_done == len(rows):
        typer.echo(f"all {num_done} rows are in {output} already", err=True)
        return
    host, tokenizer = load_host(
        base_model, adapters, dtype, device, attn_implementation, quantization
    )
    if not given:
        tell_unknown_prompts(host, tokenizer)
    batches = complete_in_order(
        host,
        tokenizer,
        prompts,
        sampling,
        batch_size=batch_size,
        num_done=num_done,
        raw=raw,
        prompt_form=given_form(tokenizer, template, chat_template),
    )
    texts = ([completion.text for completion in batch] for batch in batches)
    if file is not None:
        file.write(texts, num_done)
    elif input_file is None:
        print_answers(prompts, texts)
    else:
        print_rows([*labelled(rows, prompts)], texts)


def _read(
    prompt: str | None,
    input_file: Path | None,
    adapters: Mapping[str, str],
    *,
    no_base: bool,
    raw: bool,
) -> tuple[list[dict[str, Any]], list[Prompt]]:
    """Rows to write again, and their prompts."""
    if (prompt is None) == (input_file is None):
        raise ConfigError("generate needs either --prompt or --input; give one of them")
    from loraloom.data.files import read_file
    from loraloom.generation.prompts import Prompt

    if no_base and (input_file is not None or not adapters):
        raise ConfigError("--no-base has an effect on --prompt with --adapter only; leave it out")
    if input_file is None:
        names = [*([] if no_base else [None]), *adapters]
        return [{"prompt": prompt}] * len(names), [
            Prompt(str(prompt), name, origin="--prompt") for name in names
        ]
    asked = [
        (dict(row), prompt)
        for row in read_file(input_file)
        for prompt in _prompts_of(row, adapters, raw=raw)
    ]
    return [row for row, _ in asked], [prompt for _, prompt in asked]


def _prompts_of(row: Row, adapters: Mapping[str, str], *, raw: bool) -> list[Prompt]:
    """What a row asks: one adapter, or all of them where it names none."""
    from loraloom.data.messages import read_messages, read_tools
    from loraloom.generation.prompts import Prompt

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
