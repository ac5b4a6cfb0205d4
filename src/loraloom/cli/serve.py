"""`loraloom serve`: the base model and its adapters behind OpenAI's API."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Option

from loraloom.cli.options import parse_adapters, tell_unknown_prompts
from loraloom.cli.typer_options import (
    AdapterOption,
    AttnOption,
    BaseModelOption,
    ChatTemplateOption,
    DeviceOption,
    DtypeOption,
    QuantizationOption,
    path_option,
)
from loraloom.config.fields import checked
from loraloom.config.model import BaseModelConfig
from loraloom.errors import ConfigError

if TYPE_CHECKING:
    import socket

    from loraloom.generation.engine import Engine
    from loraloom.serve.adapters import ServedAdapters

MaxRowsOption = Annotated[
    int, Option("--max-rows", min=1, help="Most completions that are made at once.")
]
CacheTokensOption = Annotated[
    int | None,
    Option(
        "--cache-tokens",
        min=32,
        help="Tokens of the key-value cache. Default: all rows at full length, as far as a quarter "
        "of the free memory goes.",
    ),
]


_EMBEDDED_ONLY = {
    "cache_tokens": "vLLM sizes its cache itself",
    "prefill_tokens": "vLLM plans its steps itself",
    "max_waiting": "vLLM's queue has no bound",
    "max_request_seconds": "vLLM's requests have no time limit",
    "max_body_bytes": "vLLM's requests have no size limit",
    "shared_prompt_cache": "vLLM's prompt cache is shared unless requests have a cache_salt",
    "max_connections": "vLLM's connections have no bound",
    "header_seconds": "vLLM waits for headers as long as uvicorn does",
    "body_seconds": "vLLM waits for bodies for ever",
    "idle_seconds": "vLLM closes idle connections in its own time",
    "access_log": "vLLM has a log of its own",
    "max_adapter_bytes": "vLLM's adapters have slots of one size",
    "admin_key_file": "vLLM's keys are all alike",
    "adapter_root": "vLLM loads from any path",
    "chat_template": "vLLM has --chat-template of its own",
    "device": "vLLM runs where it was built for",
    "quantization": "vLLM quantises in ways of its own",
    "attn_implementation": "vLLM has attention of its own",
}
"""Options that vLLM can't honour, and why."""


def serve(
    base_model: BaseModelOption,
    adapter: AdapterOption = None,
    adapter_dir: Annotated[
        Path | None,
        path_option(
            "--adapter-dir",
            metavar="DIR",
            help="A directory of adapters; each is loaded when it is first asked for.",
        ),
    ] = None,
    max_adapters: Annotated[int, Option(min=1, help="Most adapters of --adapter-dir at once.")] = 8,
    max_adapter_bytes: Annotated[int | None, Option(min=1, help="Most memory of adapters.")] = None,
    host: Annotated[str, Option(help="Address; other machines' needs a key.")] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0 takes any free one.")] = 8000,
    api_key_file: Annotated[
        Path | None, path_option("--api-key-file", metavar="FILE", help="API keys, one a line.")
    ] = None,
    no_api_key: Annotated[bool, Option("--no-api-key", help="Let anybody ask.")] = False,
    allow_loading: Annotated[
        bool,
        Option(
            "--allow-loading",
            help="Let clients load and unload adapters by path; where there are API keys, with one "
            "of --admin-key-file.",
        ),
    ] = False,
    admin_key_file: Annotated[
        Path | None,
        path_option(
            "--admin-key-file", metavar="FILE", help="Keys that may load adapters, one a line."
        ),
    ] = None,
    adapter_root: Annotated[
        Path | None,
        path_option(
            "--adapter-root",
            metavar="DIR",
            help="Let clients load adapters below DIR alone, and none of the Hub.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None, Option(help="A web page's origin that may ask. May be repeated.")
    ] = None,
    max_rows: MaxRowsOption = 32,
    cache_tokens: CacheTokensOption = None,
    prefill_tokens: Annotated[int, Option(min=1, help="Most prompt tokens read in a step.")] = 256,
    shared_prompt_cache: Annotated[
        bool,
        Option(
            "--shared-prompt-cache",
            help="Let API keys use one another's cached prompts; response times then reveal which "
            "prompts other keys have sent.",
        ),
    ] = False,
    max_waiting: Annotated[int, Option(min=1, help="Most completions that wait.")] = 256,
    max_request_seconds: Annotated[float, Option(min=1, help="Longest time of a request.")] = 600.0,
    max_body_bytes: Annotated[int, Option(min=1024, help="Largest request.")] = 2 << 20,
    max_connections: Annotated[
        int | None,
        Option(
            min=1,
            help="Most connections at once; the longest idle one goes for a new one. Default: what "
            "the limit of open files has room for, at most 1024.",
        ),
    ] = None,
    header_seconds: Annotated[float, Option(min=0.1, help="Time for a request's headers.")] = 10.0,
    body_seconds: Annotated[
        float,
        Option(min=0.1, help="Time for a body, and for a client to read some of an answer."),
    ] = 60.0,
    idle_seconds: Annotated[float, Option(min=0.1, help="Time between two requests.")] = 30.0,
    access_log: Annotated[bool, Option(help="Write a line of each request.")] = True,
    chat_template: ChatTemplateOption = None,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    device: DeviceOption = "auto",
    attn_implementation: AttnOption = None,
    engine_name: Annotated[
        Literal["embedded", "vllm"],
        Option("--engine", help="loraloom's own, or vLLM with loraloom's plug-in."),
    ] = "embedded",
) -> None:
    """Serve the base model and its adapters with OpenAI's API."""
    given = locals()
    from loraloom.serve.process import is_loopback, read_keys

    adapters = parse_adapters(adapter or ())
    is_local = is_loopback(host)
    if not is_local and api_key_file is None and not no_api_key:
        raise ConfigError(
            f"--host {host} can be reached from other machines: give --api-key-file, or "
            "--no-api-key if anybody may ask"
        )
    for option, path in (("--adapter-dir", adapter_dir), ("--adapter-root", adapter_root)):
        if path is not None and not path.is_dir():
            raise ConfigError(f"{option} must be a directory, there is no {path}")
    keys = [] if api_key_file is None else read_keys(api_key_file)
    if engine_name == "vllm":
        from loraloom.serve.vllm import serve_with_vllm

        _refuse_embedded_only(given)
        found = {"adapters": adapters, "api_keys": keys, "cors_origins": cors_origin or ()}
        serve_with_vllm(SimpleNamespace(**given, **found))
        return
    admin_keys = [] if admin_key_file is None else read_keys(admin_key_file)
    if allow_loading and not admin_keys and (keys or not is_local):
        raise ConfigError(
            "--allow-loading lets whoever asks replace adapters: give --admin-key-file, with keys "
            "that may load them"
        )
    _serve_embedded(SimpleNamespace(**given), adapters, is_local, keys, admin_keys)


def _serve_embedded(
    given: Any, adapters: Mapping[str, str], is_local: bool, keys: list[str], admin_keys: list[str]
) -> None:
    """Serve with our own engine; `given` are the options."""
    from loraloom.data.templates import load_chat_template
    from loraloom.generation.engine import Engine
    from loraloom.generation.loading import check_sources, default_cache_tokens, load_host
    from loraloom.generation.scheduler import EngineLimits
    from loraloom.serve.adapters import ServedAdapters
    from loraloom.serve.http.app import ApiOptions, create_app
    from loraloom.serve.http.server import ConnectionLimits, Server, listen
    from loraloom.serve.process import bound_memory, run_apart

    bound_memory()
    asked = {name: getattr(given, name) for name in BaseModelConfig.model_fields}
    base = checked(BaseModelConfig, asked)
    check_sources(base, adapters)
    connections = ConnectionLimits(
        given.max_connections, given.header_seconds, given.body_seconds, given.idle_seconds
    )
    with listen(given.host, given.port) as sock:

        def prepare() -> tuple[Engine, ServedAdapters, Any]:
            model, tokenizer = load_host(base, {})
            if given.chat_template is not None:
                template = load_chat_template(tokenizer, given.chat_template)
                tokenizer.chat_template = template.source()
            limits = EngineLimits(
                given.max_rows,
                given.cache_tokens or default_cache_tokens(model, given.max_rows),
                given.prefill_tokens,
                given.max_waiting,
                given.max_request_seconds,
                "shared" if given.shared_prompt_cache else "own",
            )
            engine = Engine(model, tokenizer, limits)
            shelf = ServedAdapters(
                model,
                given.base_model,
                given.adapter_dir,
                given.max_adapters,
                engine.forget,
                max_bytes=given.max_adapter_bytes,
            )
            for name, path in adapters.items():
                shelf.add(name, path)
            _announce(engine, shelf, sock)
            tell_unknown_prompts(model, tokenizer)
            return engine, shelf, tokenizer

        engine, shelf, tokenizer = run_apart(prepare)
        options = ApiOptions(
            keys,
            admin_keys,
            given.allow_loading,
            given.adapter_root,
            given.cors_origin or (),
            given.max_body_bytes,
            is_local,
            given.access_log,
        )
        app = create_app(engine, tokenizer, shelf, options)
        _write_log()
        Server(app, engine, connections).run([sock])


def _refuse_embedded_only(given: Mapping[str, object]) -> None:
    defaults = signature(serve).parameters
    for name, reason in _EMBEDDED_ONLY.items():
        if given[name] != defaults[name].default:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} can't be used with --engine vllm: {reason}")


def _write_log() -> None:
    """Write what loraloom logs to stderr; what clients cause without asking once a second."""
    from loraloom.serve.http.server import OnceASecond

    for name in (
        "asyncio",
        "uvicorn.error",
        "loraloom.generation.sequence",
        "loraloom.serve.http.server",
    ):
        logging.getLogger(name).addFilter(OnceASecond())
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("loraloom")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _announce(engine: Engine, shelf: ServedAdapters, sock: socket.socket) -> None:
    """Say what is served, where, and what it may take."""
    from loraloom.generation.loading import cache_bytes

    address, port = sock.getsockname()[:2]
    address = f"[{address}]" if ":" in address else address
    size = cache_bytes(engine.host, engine.limits)
    names = ", ".join([shelf.base_name, *shelf.names()])
    typer.echo(f"models: {names}")
    typer.echo(
        f"cache: {engine.limits.cache_tokens:,} tokens, {size / 2**20:,.0f} MiB; "
        f"at most {engine.limits.max_rows} rows of {engine.max_length:,} tokens"
    )
    typer.echo(f"listening on http://{address}:{port}/v1")
