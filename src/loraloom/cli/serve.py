"""`loraloom serve`: the base model and its adapters behind OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loraloom.cli.options import (
    AdapterOption,
    AttnOption,
    BaseModelOption,
    DeviceOption,
    DtypeOption,
    QuantizationOption,
    parse_adapters,
    path_option,
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
    allow_loading: Annotated[
        bool,
        typer.Option("--allow-loading", help="Let clients load and unload adapters by path."),
    ] = False,
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
    if adapter_dir is not None and not adapter_dir.is_dir():
        raise ConfigError(f"--adapter-dir must be a directory, there is no {adapter_dir}")
    from loraloom.serve.access import read_keys

    keys = [] if api_key_file is None else read_keys(api_key_file)
    if engine_name == "vllm":
        from loraloom.serve.vllm.launch import VllmOptions, serve_with_vllm

        _refuse_embedded_only(given)
        same = {name: given[name] for name in VllmOptions.__annotations__ if name in given}
        serve_with_vllm(
            VllmOptions(**same, adapters=adapters, api_keys=keys, cors_origins=cors_origin or ())
        )
        return
    from loraloom.infer.loading import check_sources, load_host
    from loraloom.serve.adapters import AdapterShelf
    from loraloom.serve.allocator import bound_kernel_caches, return_freed_memory
    from loraloom.serve.engine import Engine
    from loraloom.serve.http.app import ApiOptions, create_app
    from loraloom.serve.http.server import Server, listen
    from loraloom.serve.limits import EngineLimits
    from loraloom.serve.memory import default_cache_tokens
    from loraloom.serve.threads import run_apart

    return_freed_memory()
    bound_kernel_caches()
    check_sources(base_model, adapters, device, dtype, quantization)
    with listen(host, port) as sock:

        def prepare() -> tuple[Engine, AdapterShelf, Any]:
            model, tokenizer = load_host(
                base_model, {}, dtype, device, attn_implementation, quantization
            )
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
            shelf = AdapterShelf(model, base_model, adapter_dir, max_adapters, engine.forget)
            for name, path in adapters.items():
                shelf.load(name, path)
            _announce(engine, shelf, sock)
            return engine, shelf, tokenizer

        engine, shelf, tokenizer = run_apart(prepare)
        options = ApiOptions(keys, allow_loading, cors_origin or (), max_body_bytes, is_local)
        app = create_app(engine, tokenizer, shelf, options)
        Server(app, engine).run([sock])


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
