"""The adapters on a base model: put on, saved, combined, merged, taken off."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.method import Adapter, AdapterConfig, check_config
from loraloom.adapters.own import own_parts, tensor_shapes
from loraloom.config.fields import check_name
from loraloom.errors import AdapterError
from loraloom.formats.card import model_card
from loraloom.formats.files import read_stored, write_adapter
from loraloom.formats.fit import fit_to_base
from loraloom.formats.hub import find_adapter, upload_adapter
from loraloom.models.combining import Combination, combine
from loraloom.models.families import base_info, base_layers, text_config
from loraloom.models.layout import RowAdapter
from loraloom.models.merging import Merged, MergeError
from loraloom.models.own import build_own_modules
from loraloom.models.stacks import ScaledAdapter
from loraloom.models.structure import family_of
from loraloom.models.wiring import Wiring


class HostedAdapters:
    """What a host knows of its base model and the adapters on it; forwards are `Host`'s."""

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.adapters: dict[str, Adapter] = {}
        self._family = family_of(model)
        self._base_layers = base_layers(model, self._family)
        self.base = base_info(model, self._family, self._base_layers)
        self._wiring = Wiring(model, self._family)
        self._inside = threading.RLock()
        self._detached = False
        self._merged: Merged | None = None

    @property
    def config(self) -> Any:
        """The configuration of the base model's text part, which most models are all of."""
        return text_config(self.model)

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype, in which low-rank products run."""
        return self.model.dtype

    def add(
        self,
        name: str,
        config: AdapterConfig,
        seed: int = 0,
    ) -> Adapter:
        """Put a new adapter on the base model.

        Args:
            name: A safe file name that is not taken.
            config: Method and settings.
            seed: Of the initial weights.

        Raises:
            ConfigError: If the name is not a safe file name, or the configuration not loraloom's.
            AdapterError: If it is taken, or target modules are not in the base model.
        """
        self._check_unmerged("start an adapter")
        adapter = self._build(name, config, seed)
        if config.target_modules == "all-linear" and not self.base.ffn_projections:
            warnings.warn(
                f"adapter {name!r} is on attention alone: the base model's FFN blocks are mixtures "
                "of experts, which stay as they are; target_modules: attention means the same",
                stacklevel=2,
            )
        return self._register(adapter)

    def load(
        self, name: str, path_or_hub_id: str | Path, settings: Mapping[str, Any] | None = None
    ) -> Adapter:
        """Put an adapter from files on the base model.

        Args:
            name: A safe file name that is not taken.
            path_or_hub_id: A directory or a hub id, in PEFT's, MoE-PEFT's, axolotl's or loraloom's
                layout.
            settings: Of the method, `{"top_k": 2}` for instance: what the files don't tell, or in
                place of what they do.

        Raises:
            FormatError: If the files can't be read.
            AdapterError: If they don't fit the base model, the name is taken, or the adapter
                depends on weights in which another one is merged.
        """
        stored = read_stored(find_adapter(path_or_hub_id), settings)
        config, tensors = fit_to_base(stored, self.base)
        if config.takes_start_off or tensor_shapes(config, self.base).keys() - tensors.keys():
            self._check_unmerged("load what depends on its weights")
        adapter = self._build(name, config, seed=0)
        adapter.load_tensors(tensors)
        adapter.prompt = stored.base.prompt
        return self._register(adapter)

    def save(
        self,
        name: str,
        directory: str | Path,
        card: str | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Write an adapter's files, in the layout of its method (docs/peft.md has a table).

        Args:
            name: Of the adapter.
            directory: Where to; made when missing.
            card: Text of its README.md; a short model card by default.
            overwrite: Replace an adapter that is there.

        Raises:
            AdapterError: If there is no such adapter, or the directory holds one already.
        """
        adapter = self.adapter(name)
        tensors = adapter.tensors()
        write_adapter(
            directory,
            adapter.config,
            tensors,
            self.base,
            card,
            prompt=adapter.prompt,
            overwrite=overwrite,
        )

    def push_to_hub(
        self, name: str, hub_id: str, *, results: str | None = None, private: bool = False
    ) -> str:
        """Upload an adapter's files with a model card: base model, method and results.

        Args:
            name: Of the adapter.
            hub_id: `owner/name` of a repository, made if it isn't there.
            results: Markdown on evaluations for the card, a table for instance.
            private: Whether a new repository is.

        Returns:
            The repository's address; `load` takes its id.

        Raises:
            AdapterError: If there is no such adapter.
            FormatError: If the Hub can't be reached or refuses.
        """
        adapter = self.adapter(name)
        card = model_card(
            adapter.config, self.base, name=name, results=results, prompt=adapter.prompt
        )
        with TemporaryDirectory() as directory:
            self.save(name, directory, card)
            return upload_adapter(Path(directory), hub_id, private=private)

    def remove(self, name: str) -> None:
        """Take an adapter off and free it.

        Raises:
            AdapterError: If there is none of that name, or it is merged.
        """
        self.adapter(name)
        if name == self.merged:
            raise AdapterError(f"adapter {name!r} must not be merged to be removed; unmerge it")
        del self.adapters[name]

    def combine(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        combination: Combination = "linear",
        *,
        name: str,
        density: float | None = None,
        seed: int = 0,
    ) -> Adapter:
        """Make a new adapter of several of one method, by PEFT's merge functions.

        Updates are combined as PEFT's `add_weighted_adapter` does it, experts with the experts of
        their number. Routers and DoRA's magnitudes are averaged by the weights' shares.

        Args:
            adapters: Names of those that are combined; they stay.
            weights: A factor for each one's update, perhaps negative.
            combination: `linear` adds A and B up, `svd` the updates BA; `ties` keeps the largest
                values of A and B and the majority's sign, `dare_ties` random ones.
            name: Of the new adapter, a safe file name that is not taken.
            density: Share of the values that ties and dare_ties keep, 0.5 by default.
            seed: Of dare_ties' draws.

        Raises:
            AdapterError: If there is no such adapter, they differ in more than rank, scaling and
                targets, or their method's updates are no products BA.
            ConfigError: If weights or density can't be used, or PEFT is not installed.
        """
        sources = [self.adapter(source) for source in adapters]
        config, tensors = combine(sources, weights, combination, density, seed)
        adapter = self._build(name, config, seed=0)
        shapes = {key: tensor.shape for key, tensor in adapter.tensors().items()}
        prompts = [source.prompt for source in sources]
        adapter.prompt = prompts[0] if all(one == prompts[0] for one in prompts) else None
        adapter.load_tensors(
            {key: _padded(tensor, shapes.get(key)) for key, tensor in tensors.items()}
        )
        return self._register(adapter)

    @property
    def merged(self) -> str | None:
        """The adapter that is in the base model's weights; None for none."""
        return None if self._merged is None else self._merged.name

    def merge(self, name: str) -> MergeError:
        """Put an adapter's updates into the base model's weights.

        Rows without an adapter are its own then, at the base model's speed. Other adapters add to
        the merged weights. The original weights are kept, on the CPU. Nothing trains, and decoding
        sessions that have begun must not go on.

        Args:
            name: Of an adapter without routers.

        Returns:
            What rounding to the base model's dtype cost.

        Raises:
            AdapterError: If there is no such adapter, it has routers, one is merged already, or
                the base's weights are quantised; the base model is as it was then.
        """
        adapter = self.adapter(name)
        if self._merged is not None:
            raise AdapterError(
                f"no adapter may be merged yet, {self.merged!r} is; unmerge it first"
            )
        with self._inside:
            self._merged = Merged(adapter)
        return self._merged.error

    def unmerge(self, name: str) -> None:
        """Put the base model's weights back as they were, bit by bit.

        Raises:
            AdapterError: If that adapter is not merged.
        """
        if self._merged is None or name != self.merged:
            raise AdapterError(f"the adapter to unmerge must be {self.merged}, got {name!r}")
        with self._inside:
            self._merged.undo()
            self._merged = None

    def adapter(self, name: str) -> Adapter:
        """Return an adapter.

        Raises:
            AdapterError: If there is none of that name.
        """
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise AdapterError(f"adapter must be one of those on this host ({known}), got {name!r}")
        return self.adapters[name]

    def detach(self) -> nn.Module:
        """Take everything off and return the base model as it was before `attach`."""
        self._detached = True
        if self.merged is not None:
            self.unmerge(self.merged)
        self._wiring.undo()
        self.adapters.clear()
        return self.model

    def _check_new(self, name: str) -> None:
        check_name(name)
        if self._detached:
            raise AdapterError(
                "host must be attached to its model, got a detached one; attach again"
            )
        if name in self.adapters:
            raise AdapterError(f"adapter name {name!r} is taken; remove it or choose another")

    def _build(self, name: str, config: AdapterConfig, seed: int) -> Adapter:
        self._check_new(name)
        dtype = torch.promote_types(torch.float32, self.dtype)
        parts = own_parts(check_config(config), self.base)
        with torch.inference_mode(False):  # its tensors could neither be trained nor decode
            adapter = config.build(name, self._base_layers, dtype, seed)
            adapter.own_modules.extend(build_own_modules(parts, self.model, dtype))
        return adapter

    def _register(self, adapter: Adapter) -> Adapter:
        for own in adapter.own_modules:
            self._wiring.lead_through(own.path)  # pyright: ignore[reportArgumentType]
        self.adapters[adapter.name] = adapter
        return adapter

    def _row_adapters(
        self, adapters: Sequence[RowAdapter] | None, batch_size: int
    ) -> Sequence[RowAdapter]:
        if isinstance(adapters, str):
            raise AdapterError(
                f"adapters must be a list, one name a row, got the text {adapters!r}"
            )
        names = [None] * batch_size if adapters is None else list(adapters)
        if len(names) != batch_size:
            raise AdapterError(
                f"adapters must have one name or None for each of the {batch_size} rows, "
                f"got {len(names)}"
            )
        return [self._row_adapter(adapter) for adapter in names]

    def _row_adapter(self, adapter: RowAdapter) -> RowAdapter:
        """Check a row's adapter; one with the scale 1 is its name."""
        if adapter is None:
            return None
        name, scale = (adapter, 1.0) if isinstance(adapter, str) else _scaled_name(adapter)
        self.adapter(name)
        if name == self.merged:
            raise AdapterError(
                f"adapter {name!r} is merged into the base model: give None for its rows, or "
                "unmerge it"
            )
        return name if scale == 1 else (name, scale)

    def _scaled(self, adapter: str | tuple[str, float]) -> ScaledAdapter:
        name, scale = (adapter, 1.0) if isinstance(adapter, str) else adapter
        return self.adapters[name], scale

    def _check_unmerged(self, purpose: str) -> None:
        if self.merged is not None:
            raise AdapterError(
                f"the base model must be without a merged adapter to {purpose}, it has "
                f"{self.merged!r} in its weights; unmerge it first"
            )


def _scaled_name(adapter: Any) -> tuple[str, float]:
    match adapter:
        case (str(name), float() | int() as scale) if math.isfinite(scale):
            return name, float(scale)
    raise AdapterError(
        "a row's adapter must be a name, (name, scale) with a finite scale, or None, "
        f"got {adapter!r}"
    )


def _padded(tensor: Tensor, shape: torch.Size | None) -> Tensor:
    """Fill a pair of a smaller rank up with zeros, which changes no product."""
    if shape is None or len(shape) != tensor.dim() or tensor.shape == shape:
        return tensor
    if any(size > most for size, most in zip(tensor.shape, shape, strict=True)):
        return tensor
    whole = tensor.new_zeros(shape)
    whole[tuple(map(slice, tensor.shape))] = tensor
    return whole
