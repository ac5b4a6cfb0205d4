"""`loraloom serve`: the base model and its adapters behind OpenAI's API."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loraloom.cli.options import (
    AdapterOption,
    AttnOption,
    BaseModelOption,
    ChatTemplateOption,
    DeviceOption,
    DtypeOption,
    QuantizationOption,
    parse_adapters,
    path_option,
    tell_unknown_prompts,
)
from loraloom.errors import ConfigError

if TYPE_CHECKING:
    import socket

    from loraloom.serve.adapters import AdapterShelf
    from loraloom.serve.engine import Engine

MaxRowsOption = Annotated[
    int, typer.Option("--max-rows", min=1, help="Most completions that are made at once.")
]
CacheTokensOption = Annotated[
    int | None,
    typer.Option(
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
    max_adapters: Annotated[
        int, typer.Option("--max-adapters", min=1, help="Most adapters of --adapter-dir at once.")
    ] = 8,
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen on; others than this machine's need a key."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0 takes any free one.")
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        path_option("--api-key-file", metavar="FILE", help="API keys, one a line."),
    ] = None,
    no_api_key: Annotated[
        bool, typer.Option("--no-api-key", help="Let anybody ask who reaches --host.")
    ] = False,
    max_adapter_bytes: Annotated[
        int | None,
        typer.Option(
            "--max-adapter-bytes", min=1, help="Most bytes of all adapters in memory together."
        ),
    ] = None,
    allow_loading: Annotated[
        bool,
        typer.Option(
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
        list[str] | None,
        typer.Option("--cors-origin", help="A web page's origin that may ask. May be repeated."),
    ] = None,
    max_rows: MaxRowsOption = 32,
    cache_tokens: CacheTokensOption = None,
    prefill_tokens: Annotated[
        int,
        typer.Option(
            "--prefill-tokens", min=1, help="Most tokens of prompts read between decoding steps."
        ),
    ] = 256,
    max_waiting: Annotated[
        int, typer.Option("--max-waiting", min=1, help="Most completions that wait for their turn.")
    ] = 256,
    max_request_seconds: Annotated[
        float, typer.Option("--max-request-seconds", min=1, help="Longest time of a request.")
    ] = 600.0,
    shared_prompt_cache: Annotated[
        bool,
        typer.Option(
            "--shared-prompt-cache",
            help="Let API keys use one another's cached prompts; response times then reveal which "
            "prompts other keys have sent.",
        ),
    ] = False,
    max_body_bytes: Annotated[
        int, typer.Option("--max-body-bytes", min=1024, help="Largest request.")
    ] = 2 << 20,
    max_connections: Annotated[
        int | None,
        typer.Option(
            "--max-connections",
            min=1,
            help="Most connections at once; the longest idle one goes for a new one. Default: what "
            "the limit of open files has room for, at most 1024.",
        ),
    ] = None,
    header_seconds: Annotated[
        float, typer.Option("--header-seconds", min=0.1, help="Time for a request's headers.")
    ] = 10.0,
    body_seconds: Annotated[
        float,
        typer.Option(
            "--body-seconds",
            min=0.1,
            help="Time for a request's body, and for a client to read on while an answer waits.",
        ),
    ] = 60.0,
    idle_seconds: Annotated[
        float,
        typer.Option("--idle-seconds", min=0.1, help="Time of a connection without a request."),
    ] = 30.0,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="Write a line of each request.")
    ] = True,
    chat_template: ChatTemplateOption = None,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    device: DeviceOption = "auto",
    attn_implementation: AttnOption = None,
    engine_name: Annotated[
        Literal["embedded", "vllm"],
        typer.Option("--engine", help="loraloom's own, or vLLM with loraloom's plug-in."),
    ] = "embedded",
) -> None:
    """Serve the base model and its adapters with OpenAI's API."""
    given = locals()
    adapters = parse_adapters(adapter)
    is_local = _check_host(host, api_key_file, no_api_key)
    for option, path in (("--adapter-dir", adapter_dir), ("--adapter-root", adapter_root)):
        if path is not None and not path.is_dir():
            raise ConfigError(f"{option} must be a directory, there is no {path}")
    from loraloom.serve.access import read_keys

    keys = [] if api_key_file is None else read_keys(api_key_file)
    admin_keys = [] if admin_key_file is None else read_keys(admin_key_file)
    if engine_name == "vllm":
        from loraloom.serve.vllm.launch import VllmOptions, serve_with_vllm

        _refuse_embedded_only(given)
        same = {name: given[name] for name in VllmOptions.__annotations__ if name in given}
        serve_with_vllm(
            VllmOptions(**same, adapters=adapters, api_keys=keys, cors_origins=cors_origin or ())
        )
        return
    if allow_loading and not admin_keys and (keys or not is_local):
        raise ConfigError(
            "--allow-loading lets whoever asks replace adapters: give --admin-key-file, with keys "
            "that may load them"
        )
    from loraloom.data.chat_template import replace_chat_template
    from loraloom.infer.loading import check_sources, load_host
    from loraloom.serve.adapters import AdapterShelf
    from loraloom.serve.allocator import bound_kernel_caches, return_freed_memory
    from loraloom.serve.engine import Engine
    from loraloom.serve.http.app import ApiOptions, create_app
    from loraloom.serve.http.server import ConnectionLimits, Server, listen
    from loraloom.serve.limits import EngineLimits
    from loraloom.serve.memory import default_cache_tokens
    from loraloom.serve.threads import run_apart

    return_freed_memory()
    bound_kernel_caches()
    check_sources(base_model, adapters, device, dtype, quantization)
    connections = ConnectionLimits(max_connections, header_seconds, body_seconds, idle_seconds)
    with listen(host, port) as sock:

        def prepare() -> tuple[Engine, AdapterShelf, Any]:
            model, tokenizer = load_host(
                base_model, {}, dtype, device, attn_implementation, quantization
            )
            replace_chat_template(tokenizer, chat_template)
            tokens = cache_tokens or default_cache_tokens(model, max_rows)
            limits = EngineLimits(
                max_rows,
                tokens,
                prefill_tokens,
                max_waiting,
                max_request_seconds,
                shared_prompt_cache,
            )
            engine = Engine(model, tokenizer, limits)
            shelf = AdapterShelf(
                model,
                base_model,
                adapter_dir,
                max_adapters,
                engine.forget,
                max_bytes=max_adapter_bytes,
            )
            for name, path in adapters.items():
                shelf.load(name, path)
            _announce(engine, shelf, sock)
            tell_unknown_prompts(model, tokenizer)
            return engine, shelf, tokenizer

        engine, shelf, tokenizer = run_apart(prepare)
        options = ApiOptions(
            api_keys=keys,
            admin_keys=admin_keys,
            allow_loading=allow_loading,
            adapter_root=adapter_root,
            cors_origins=cors_origin or (),
            max_body_bytes=max_body_bytes,
            is_local=is_local,
            log_requests=access_log,
        )
        app = create_app(engine, tokenizer, shelf, options)
        _write_log()
        Server(app, engine, connections).run([sock])


def _check_host(host: str, api_key_file: Path | None, no_api_key: bool) -> bool:
    """Say whether only this machine reaches the server; others need keys."""
    from loraloom.serve.access import is_loopback

    is_local = is_loopback(host)
    if not is_local and api_key_file is None and not no_api_key:
        raise ConfigError(
            f"--host {host} can be reached from other machines: give --api-key-file, or "
            "--no-api-key if anybody may ask"
        )
    return is_local


def _refuse_embedded_only(given: Mapping[str, object]) -> None:
    defaults = signature(serve).parameters
    for name, reason in _EMBEDDED_ONLY.items():
        if given[name] != defaults[name].default:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option} can't be used with --engine vllm: {reason}")


def _write_log() -> None:
    """Write what loraloom logs to stderr; what clients cause without asking, once a second."""
    from loraloom.serve.http.server import OnceASecond

    for name in (
        "asyncio",
        "uvicorn.error",
        "loraloom.serve.failures",
        "loraloom.serve.http.server",
    ):
        logging.getLogger(name).addFilter(OnceASecond())
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("loraloom")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _announce(engine: Engine, shelf: AdapterShelf, sock: socket.socket) -> None:
    """Say what is served, where, and what it may take."""
    from loraloom.serve.memory import cache_bytes

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
