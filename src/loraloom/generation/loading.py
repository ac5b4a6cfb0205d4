"""A base model with adapters from files, ready for inference, and the memory of its cache."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from loraloom.base.loading import load_base_model
from loraloom.config.model import BaseModelConfig
from loraloom.devices import free_device_bytes, has_separate_memory
from loraloom.errors import ConfigError
from loraloom.formats.layouts import StoredAdapter
from loraloom.host.decoding import SPARE_TOKENS
from loraloom.host.host import Host, attach

CONTROL_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def load_host(
    model: BaseModelConfig,
    adapters: Mapping[str, StoredAdapter],
    *,
    device: str | None = None,
    sharded: bool = False,
) -> tuple[Host, PreTrainedTokenizerBase]:
    """Load a base model, which takes long, and put adapters on it that were read before."""
    base, tokenizer = load_base_model(
        model.base_model,
        model.dtype,
        device or model.device,
        model.attn_implementation,
        model.quantization,
        sharded=sharded,
    )
    host = attach(base)
    for name, adapter in adapters.items():
        host.load_stored(name, adapter)
    return host, tokenizer


def available_memory() -> int:
    """Count the bytes that the system has left, or the control group of a container (version 2)."""
    available = psutil.virtual_memory().available
    with suppress(OSError):
        path = _OWN_GROUP.read_text().rpartition("0::/")[2]
        group = CONTROL_GROUPS / path.strip()
        for directory in (group, *group.parents):
            with suppress(OSError, ValueError):  # no such file, or no limit, which is "max"
                limit = int((directory / "memory.max").read_text())
                used = int((directory / "memory.current").read_text())
                words = (directory / "memory.stat").read_text().split()
                cached = int(words[words.index("inactive_file") + 1])  # goes when it is needed
                available = min(available, max(0, limit - used + cached))
    return available


def default_cache_tokens(host: Host, max_rows: int) -> int:
    """Choose the size of the cache: rows of full length, as far as a quarter of the memory goes."""
    if has_separate_memory(host.device):
        free = free_device_bytes(host.device)
    else:
        free = available_memory()
    session = host.prefill(torch.zeros(1, 1, dtype=torch.long, device=host.device))
    affordable = int(free * 0.25) // session.states(0, 0, 1).values.nbytes
    affordable -= max_rows * SPARE_TOKENS
    if affordable < max_rows:
        raise ConfigError("a quarter of free memory is too small for the cache; lower --max-rows")
    return min(max_rows * host.max_positions, affordable)
