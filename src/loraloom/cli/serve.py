"""`loraloom serve`: the base model and its adapters behind OpenAI's API."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import DirectoryPath, Field
from typing_extensions import override

from loraloom.cli.options import HostOptions, Text, tell_unknown_prompts
from loraloom.data.templates import load_chat_template
from loraloom.errors import ConfigError
from loraloom.generation import loading
from loraloom.generation.engine import Engine
from loraloom.generation.scheduler import EngineLimits
from loraloom.serve.adapters import ServedAdapters
from loraloom.serve.process import bound_memory, is_loopback, read_keys, start_apart

# Options that vLLM heeds too.
_OF_BOTH = {
    *("base_model", "adapter", "adapter_dir", "max_adapters", "host", "port", "api_key_file"),
    *("no_api_key", "allow_loading", "cors_origin", "max_rows", "dtype", "engine"),
}


class ServeOptions(HostOptions):
    """What is served to whom, and what that may take."""

    adapter_dir: DirectoryPath | None = None
    """Serve the adapters in this directory; each is loaded when it is first asked for."""
    max_adapters: int = Field(default=8, ge=1)
    """Keep at most N adapters of --adapter-dir loaded."""
    max_adapter_bytes: int | None = Field(default=None, ge=1)
    """Keep at most N bytes of adapters loaded; by default any number."""
    host: str = "127.0.0.1"
    """Address to listen on; if other machines reach it, requests need an API key."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 for any free one."""
    api_key_file: Path | None = None
    """A file of API keys, one a line."""
    no_api_key: bool = False
    """Let anybody ask, without an API key."""
    allow_loading: bool = False
    """Let clients load and unload adapters by path or hub id; where there are API keys, with one of
    --admin-key-file."""
    admin_key_file: Path | None = None
    """A file of API keys that may load adapters, one a line."""
    adapter_root: DirectoryPath | None = None
    """Let clients load adapters from below this directory only, and none from the hub."""
    cors_origin: tuple[str, ...] = ()
    """Let web pages of this origin ask. May be repeated."""
    max_rows: int = Field(default=32, ge=1)
    """Compute at most N completions at once."""
    cache_tokens: int | None = Field(default=None, ge=32)
    """Tokens of the key-value cache. By default all rows at full length, as far as a quarter of the
    free memory goes."""
    shared_prompt_cache: bool = False
    """Share cached prompts between API keys; times of answers then reveal what others sent."""
    max_waiting: int = Field(default=256, ge=1)
    """Let at most N completions wait."""
    chat_template: Text | None = None
    """Write prompts in this chat template where an adapter has no other: a file, a Jinja text, or
    trl for its training one."""
    engine: Literal["embedded", "vllm"] = "embedded"
    """Serve with loraloom's own engine, or with vLLM and loraloom's plug-in."""

    @override
    def contradictions(self) -> Iterator[str]:
        unused: dict[str, str] = {}
        if not self.allow_loading:
            unused |= dict.fromkeys(("admin_key_file", "adapter_root"), "without --allow-loading")
        if self.adapter_dir is None:
            unused["max_adapters"] = "without --adapter-dir"
        if self.api_key_file is None and self.admin_key_file is None:
            unused["shared_prompt_cache"] = "without API keys"
        if self.no_api_key:
            unused["api_key_file"] = "with --no-api-key"
        if self.engine == "vllm":
            unused |= dict.fromkeys(type(self).model_fields.keys() - _OF_BOTH, "with --engine vllm")
        for name in sorted(self.model_fields_set & unused.keys()):
            yield f"--{name.replace('_', '-')} has no effect {unused[name]}; leave it out"


def serve(*, options: Annotated[ServeOptions, Parameter(name="*")]) -> None:
    """Serve the base model and its adapters with OpenAI's API."""
    is_local = is_loopback(options.host)
    if not is_local and options.api_key_file is None and not options.no_api_key:
        raise ConfigError(
            f"--host {options.host} can be reached from other machines: give --api-key-file, or "
            "--no-api-key if anybody may ask"
        )
    if options.derived:
        raise ConfigError(
            f"--adapter takes NAME=PATH here, got {options.derived[0]}; the embedded "
            "engine takes a sum or an expert as `model`, with nothing to declare"
        )
    keys = [] if options.api_key_file is None else read_keys(options.api_key_file)
    admin_keys = [] if options.admin_key_file is None else read_keys(options.admin_key_file)
    is_vllm = options.engine == "vllm"  # which has one kind of key
    if options.allow_loading and not (keys if is_vllm else admin_keys) and (keys or not is_local):
        raise ConfigError(
            "--allow-loading lets whoever asks replace adapters: give "
            f"--{'api' if is_vllm else 'admin'}-key-file, with keys that may load them"
        )
    if is_vllm:
        from loraloom.serve.vllm import serve_with_vllm

        base = os.path.expanduser(options.base_model)
        serve_with_vllm(options.model_copy(update={"base_model": base}), keys)
        return
    _serve_embedded(options, keys, admin_keys)


def _serve_embedded(options: ServeOptions, keys: list[str], admin_keys: list[str]) -> None:
    try:  # packages of the extra `serve`, which vLLM does without
        from loraloom.serve.http.app import ApiOptions, create_app
        from loraloom.serve.http.server import Server, listen
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serving needs the package {error.name}, which is not installed; run: pip install "
            '"loraloom[serve]"'
        ) from None
    bound_memory()
    loading.check_sources(options, options.adapters)
    # the socket comes first, so that a port in use is an error before minutes of loading
    with listen(options.host, options.port) as sock:
        engine, adapters, tokenizer = start_apart(lambda: _prepare(options, sock)).result()
        loads = (options.allow_loading, options.adapter_root)
        allowed = ApiOptions(keys, admin_keys, *loads, options.cors_origin, options.host)
        app = create_app(engine, tokenizer, adapters, allowed)
        server = Server(app, engine)
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger("loraloom").addHandler(handler)
        logging.getLogger("loraloom").setLevel(logging.INFO)
        server.run([sock])


def _prepare(options: ServeOptions, sock: socket.socket) -> tuple[Engine, ServedAdapters, Any]:
    """Load what is served, and say what and where that is."""
    model, tokenizer = loading.load_host(options, {})
    if options.chat_template is not None:
        template = load_chat_template(tokenizer, options.chat_template)
        tokenizer.chat_template = template.source()
    limits = EngineLimits(
        options.max_rows,
        options.cache_tokens or loading.default_cache_tokens(model, options.max_rows),
        max_waiting=options.max_waiting,
        shares_prompts=options.shared_prompt_cache,
    )
    engine = Engine(model, tokenizer, limits)
    found = (options.base_model, options.adapter_dir, options.max_adapters)
    adapters = ServedAdapters(model, *found, engine.forget, options.max_adapter_bytes)
    for name, path in options.adapters.items():
        asyncio.run(adapters.load(name, path))
    address, port = sock.getsockname()[:2]
    address = f"[{address}]" if ":" in address else address
    print(f"models: {', '.join([adapters.base_name, *adapters.names()])}")
    rows = f"{limits.max_rows} rows of {engine.max_length:,} tokens"
    print(f"cache: {limits.cache_tokens:,} tokens; at most {rows}")
    print(f"listening on http://{address}:{port}/v1", flush=True)
    tell_unknown_prompts(model, tokenizer)
    return engine, adapters, tokenizer
