"""`loraloom serve`: the base model and its adapters behind OpenAI's API."""

import asyncio
import gc
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import ByteSize, DirectoryPath, Field, StringConstraints
from typing_extensions import override

from loraloom.cli.options import HostOptions, Section, Text, tell_unknown_prompts
from loraloom.config.data import PromptForm
from loraloom.data.encoding import given_form
from loraloom.data.templates import given_source
from loraloom.errors import ConfigError
from loraloom.formats.raw_files import find_adapter
from loraloom.generation import loading
from loraloom.generation.engine import Engine
from loraloom.generation.scheduler import EngineLimits
from loraloom.serve.adapter_cache import ServedAdapters
from loraloom.serve.process import KeyFiles, LineFormatter, bound_memory, is_loopback, start_apart

# Options that vLLM heeds too.
_OF_BOTH = {
    *("base_model", "adapter", "adapter_dir", "max_adapters", "host", "port", "api_key_file"),
    *("no_api_key", "allow_loading", "cors_origin", "max_rows", "dtype", "engine"),
    "served_model_name",
}
_HostName = Annotated[str, StringConstraints(pattern=r"^(\*\.)?[\w.-]+$|^\[[\da-fA-F:]+\]$")]
_ModelName = Annotated[str, StringConstraints(min_length=1, max_length=300)]


class ServeOptions(HostOptions):
    """What is served to whom, and what that may take."""

    adapter_dir: DirectoryPath | None = None
    """Serve the adapters in this directory; load each at its first request."""
    served_model_name: tuple[_ModelName, ...] = ()
    """Call the base model NAME in requests. Repeatable: answers carry the first name. Default:
    --base-model."""
    max_adapters: Annotated[int, Section.LIMITS] = Field(default=8, ge=1)
    """Keep at most N adapters of --adapter-dir loaded, and one more for each API key that would
    otherwise have none while others use all."""
    max_adapter_bytes: Annotated[ByteSize | None, Section.LIMITS] = Field(default=None, gt=0)
    """Keep at most N bytes of adapters loaded, for example 20GB. Those of --adapter-dir leave for
    others, as with --max-adapters. Default: no limit."""
    host: Annotated[str, Section.SERVER] = "127.0.0.1"
    """Listen on this address. One that other machines can reach requires API keys."""
    port: Annotated[int, Section.SERVER] = Field(default=8000, ge=0, le=65535)
    """Listen on this port; 0: any free port."""
    api_key_file: Annotated[Path | None, Section.SERVER] = None
    """Accept the API keys in this file, one per line; reread at SIGHUP."""
    no_api_key: Annotated[bool, Section.SERVER] = False
    """Allow requests without an API key."""
    allow_loading: Annotated[bool, Section.SERVER] = False
    """Allow clients to load and unload adapters; with API keys, only those of --admin-key-file."""
    admin_key_file: Annotated[Path | None, Section.SERVER] = None
    """Accept the API keys in this file, one per line, for loading adapters."""
    adapter_root: Annotated[DirectoryPath | None, Section.SERVER] = None
    """Restrict loading to adapters below this directory, without the Hub."""
    allowed_host: Annotated[tuple[_HostName, ...], Section.SERVER] = ()
    """Accept requests for this host name, or *.NAME, as well as for this machine's. Repeatable."""
    cors_origin: Annotated[tuple[str, ...], Section.SERVER] = ()
    """Allow browser requests from this origin. Repeatable."""
    allow_control_tokens: Annotated[bool, Section.SERVER] = False
    """Read control tokens in chat messages, such as <|im_end|>, as such and not as text."""
    max_rows: Annotated[int, Section.LIMITS] = Field(default=32, ge=1)
    """Compute at most N completions at once."""
    cache_tokens: Annotated[int | None, Section.LIMITS] = Field(default=None, ge=32)
    """Size the key-value cache for N tokens. Default: --max-rows at full length, in at most a
    quarter of free memory."""
    max_waiting: Annotated[int, Section.LIMITS] = Field(default=256, ge=1)
    """Queue at most N completions."""
    chat_template: Text | None = None
    """Use this chat template for models without a prompt form: a file, a Jinja string or hermes."""
    tool_template: Text | None = None
    """Use this chat template for requests with tools: hermes (for ChatML), a file or a Jinja
    string. Adapters trained with another template keep it."""
    engine: Annotated[Literal["embedded", "vllm"], Section.SERVER] = "embedded"
    """Serve with loraloom's engine, or with vLLM and loraloom's plug-in."""

    @override
    def contradictions(self) -> Iterator[str]:
        if self.engine == "vllm":
            names = type(self).model_fields.keys() - _OF_BOTH
            yield from self.misused(names, "is not supported with --engine vllm; remove the option")
        elif not self.allow_loading:
            yield from self.misused(["admin_key_file", "adapter_root"], "requires --allow-loading")
        if self.adapter_dir is None:
            yield from self.misused(["max_adapters"], "requires --adapter-dir")
        if self.no_api_key and self.api_key_file is not None:
            yield "--api-key-file and --no-api-key exclude each other; pass only one option"


def serve(*, options: Annotated[ServeOptions, Parameter(name="*"), Section.MODEL]) -> None:
    """Serve the base model and its adapters with OpenAI's API."""
    is_local = is_loopback(options.host)
    if not is_local and options.api_key_file is None and not options.no_api_key:
        raise ConfigError(
            f"--host {options.host} is reachable from other machines; pass --api-key-file FILE, or "
            "--no-api-key to accept anyone's requests"
        )
    if options.derived:
        raise ConfigError(
            f"--adapter must be NAME=PATH here, got {options.derived[0]}; clients of the embedded "
            "engine can request a sum or an expert as `model` without declaration"
        )
    if names := {*options.served_model_name} & {*options.adapters}:
        raise ConfigError(f"{min(names)!r} names the base model and an adapter; change one name")
    key_files = KeyFiles(options.api_key_file, options.admin_key_file)
    keys, admin_keys = key_files.keys
    is_vllm = options.engine == "vllm"  # which has one kind of key
    if options.allow_loading and not (keys if is_vllm else admin_keys) and (keys or not is_local):
        raise ConfigError(
            "--allow-loading would let any client replace adapters; pass "
            f"--{'api' if is_vllm else 'admin'}-key-file FILE with the keys that may load adapters"
        )
    if is_vllm:
        from loraloom.serve.vllm import serve_with_vllm

        base = os.path.expanduser(options.base_model)
        serve_with_vllm(options.model_copy(update={"base_model": base}), keys)
        return
    key_files.watch()
    _serve_embedded(options, keys, admin_keys)


def _serve_embedded(options: ServeOptions, keys: list[str], admin_keys: list[str]) -> None:
    try:  # packages of the extra `serve`, which vLLM does without
        from loraloom.serve.http.app import ApiOptions, create_app
        from loraloom.serve.http.server import Server, listen
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serving requires the package {error.name}, which is not installed; run: pip install "
            '"loraloom[serve]"'
        ) from None
    bound_memory()
    # adapters and the socket come first, so that a wrong path or a port in use is an error before
    # minutes of loading
    for path in options.adapters.values():
        find_adapter(path)
    with listen(options.host, options.port) as sock:
        preparing = start_apart(_prepare, options, sock)
        engine, adapters, tokenizer, tool_form = preparing.result()
        allowed = ApiOptions(
            api_keys=keys,
            admin_keys=admin_keys,
            allow_loading=options.allow_loading,
            adapter_root=options.adapter_root,
            cors_origins=options.cors_origin,
            host=options.host,
            allow_control_tokens=options.allow_control_tokens,
            allowed_hosts=[name.lower() for name in options.allowed_host],
            tool_form=tool_form,
        )
        app = create_app(engine, tokenizer, adapters, allowed)
        # what stays is not collected again: a pass over it stops all threads, for every request
        gc.collect()
        gc.freeze()
        server = Server(app, engine)
        handler = logging.StreamHandler()
        handler.setFormatter(LineFormatter())
        logging.getLogger().addHandler(handler)  # of others' errors too
        logging.getLogger("loraloom").setLevel(logging.INFO)
        server.run([sock])


def _prepare(
    options: ServeOptions, sock: socket.socket
) -> tuple[Engine, ServedAdapters, Any, PromptForm | None]:
    model, tokenizer = loading.load_host(options, {})
    model.default_form = given_form(tokenizer, None, options.chat_template)
    tool_form = None
    if options.tool_template is not None:
        source = given_source(tokenizer, options.tool_template, "tool_template")
        tool_form = PromptForm(format="chat", chat_template=source)
    limits = EngineLimits(
        options.max_rows,
        options.cache_tokens or loading.default_cache_tokens(model, options.max_rows),
        max_waiting=options.max_waiting,
    )
    engine = Engine(model, tokenizer, limits)
    base_name, *aliases = options.served_model_name or (options.base_model,)
    adapters = ServedAdapters(
        model,
        base_name,
        options.adapter_dir,
        options.max_adapters,
        engine.forget,
        max_waiting=options.max_waiting,
        base_aliases=aliases,
        max_bytes=options.max_adapter_bytes or sys.maxsize,
    )
    for name, path in options.adapters.items():
        asyncio.run(adapters.load(name, path, replace=True))
    address, port = sock.getsockname()[:2]
    if ":" in address:
        address = f"[{address}]"
    print(f"models: {', '.join([*adapters.base_names, *asyncio.run(adapters.names())])}")
    dtype = str(model.dtype).removeprefix("torch.")
    quantization = f", quantized to {options.quantization}" if options.quantization else ""
    print(f"base model: {dtype} on {model.device}{quantization}")
    rows = f"{limits.max_rows} rows of {engine.max_length:,} tokens"
    print(f"cache: {limits.cache_tokens:,} tokens; at most {rows}")
    print(f"listening on http://{address}:{port}/v1", flush=True)
    if options.chat_template is None:
        tell_unknown_prompts(model, tokenizer)
    return engine, adapters, tokenizer, tool_form
