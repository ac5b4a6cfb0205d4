"""Weights to start from: those of an adapter that was trained before."""

from __future__ import annotations

from loraloom.adapters.adapter import Adapter
from loraloom.adapters.config import AdapterConfig
from loraloom.errors import ConfigError
from loraloom.formats.files import read_adapter
from loraloom.models.host import Host


def load_start(host: Host, adapter: Adapter, path_or_hub_id: str) -> None:
    """Give a new adapter the weights of another one of the same kind and size.

    Raises:
        FormatError: If the files can't be read.
        ConfigError: If the other adapter computes something else with its weights.
        AdapterError: If names or shapes of weights differ.
    """
    config, tensors = read_adapter(path_or_hub_id, host.base)
    wanted, stored = _formula(adapter.config), _formula(config)
    changed = [
        f"{name} is {value!r} and that adapter's {stored.get(name)!r}"
        for name, value in wanted.items()
        if stored.get(name) != value
    ]
    if changed:
        raise ConfigError(
            f"start_from needs an adapter with the job's own settings, got {path_or_hub_id}: "
            f"{'; '.join(changed)}"
        )
    adapter.load_tensors(tensors)


def _formula(config: AdapterConfig) -> dict[str, object]:
    """Return what decides how weights are used, and most of what decides their shapes."""
    return {"method": config.method, **config.summary()}
