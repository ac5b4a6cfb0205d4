"""`loraloom serve`: the base model and its adapters behind OpenAI's API."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
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
from loraloom.serve.process import bound_memory, is_loopback, read_keys, run_apart

# Options that vLLM heeds too.
_OF_BOTH = {
    *("base_model", "adapter", "adapter_dir", "max_adapters", "host", "port", "api_key_file"),
    *("no_api_key", "allow_loading", "cors_origin", "max_rows", "dtype", "engine"),
}


class ServeOptions(HostOptions):
    """What is served to whom, and what that may take."""

    adapter_dir: DirectoryPath | None = None
    """A directory of adapters; each is loaded when it is first asked for."""
    max_adapters: int = Field(default=8, ge=1)
    """Most adapters of --adapter-dir at once."""
    max_adapter_bytes: int | None = Field(default=None, ge=1)
    """Most memory of adapters."""
    host: str = "127.0.0.1"
    """Address; other machines' needs a key."""
    port: int = Field(default=8000, ge=0, le=65535)
    """0 takes any free one."""
    api_key_file: Path | None = None
    """API keys, one a line."""
    no_api_key: bool = False
    """Let anybody ask."""
    allow_loading: bool = False
    """Let clients load and unload adapters by path; where there are API keys, with one of
    --admin-key-file."""
    admin_key_file: Path | None = None
    """Keys that may load adapters, one a line."""
    adapter_root: DirectoryPath | None = None
    """Let clients load adapters below DIR alone, and none of the Hub."""
    cors_origin: tuple[str, ...] = ()
    """A web page's origin that may ask. May be repeated."""
    max_rows: int = Field(default=32, ge=1)
    """Most completions that are made at once."""
    cache_tokens: int | None = Field(default=None, ge=32)
    """Tokens of the key-value cache. By default all rows at full length, as far as a quarter of the
    free memory goes."""
    shared_prompt_cache: bool = False
    """Let API keys use one another's prompts, which the time of an answer then tells."""
    max_waiting: int = Field(default=256, ge=1)
    """Most completions that wait."""
    chat_template: Text | None = None
    """In place of the tokenizer's: a file, a Jinja text, or trl for its training one."""
    engine: Literal["embedded", "vllm"] = "embedded"
    """loraloom's own, or vLLM with loraloom's plug-in."""

    @override
    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        if self.engine == "vllm":
            for name in sorted(self.model_fields_set - _OF_BOTH):
                yield f"--{name.replace('_', '-')} has no effect with --engine vllm; leave it out"


def serve(*, options: Annotated[ServeOptions, Parameter(name="*")]) -> None:
    """Serve the base model and its adapters with OpenAI's API."""
    is_local = is_loopback(options.host)
    if not is_local and options.api_key_file is None and not options.no_api_key:
        raise ConfigError(
            f"--host {options.host} can be reached from other machines: give --api-key-file, or "
            "--no-api-key if anybody may ask"
        )
    keys = [] if options.api_key_file is None else read_keys(options.api_key_file)
    if options.engine == "vllm":
        from loraloom.serve.vllm import serve_with_vllm

        found = {"adapters": options.adapters, "api_keys": keys}
        serve_with_vllm(SimpleNamespace(**dict(options), **found, cors_origins=options.cors_origin))
        return
    admin_keys = [] if options.admin_key_file is None else read_keys(options.admin_key_file)
    if options.allow_loading and not admin_keys and (keys or not is_local):
        raise ConfigError(
            "--allow-loading lets whoever asks replace adapters: give --admin-key-file, with keys "
            "that may load them"
        )
    _serve_embedded(options, is_local, keys, admin_keys)


def _serve_embedded(
    options: ServeOptions, is_local: bool, keys: list[str], admin_keys: list[str]
) -> None:
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
        engine, adapters, tokenizer = run_apart(lambda: _prepare(options, sock))
        allowed = ApiOptions(
            keys,
            admin_keys,
            options.allow_loading,
            options.adapter_root,
            options.cors_origin,
            is_local=is_local,
        )
        app = create_app(engine, tokenizer, adapters, allowed)
        server = Server(app, engine)
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        for name in ("loraloom", "uvicorn.access"):
            logging.getLogger(name).addHandler(handler)
            logging.getLogger(name).setLevel(logging.INFO)
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
    adapters = ServedAdapters(
        model,
        options.base_model,
        options.adapter_dir,
        options.max_adapters,
        engine.forget,
        max_bytes=options.max_adapter_bytes,
    )
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
