"""One frozen base model and the adapters on it.

Axes: B batch, L sequence, N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.adapter import Adapter
from loraloom.adapters.lora import LoraAdapter
from loraloom.adapters.mixlora import MixLoraAdapter
from loraloom.config.adapter import LoraConfig
from loraloom.config.fields import check_name
from loraloom.errors import AdapterError, ModelError
from loraloom.formats.files import read_adapter, write_adapter
from loraloom.models.autocast import compute_dtype
from loraloom.models.families import base_info, base_layers, family_of, head_of
from loraloom.models.layout import Layout, make_layout
from loraloom.models.packing import (
    SampleLengths,
    check_takes_packed_rows,
    packed_positions,
    packed_token_mask,
)
from loraloom.models.running import RunningForward, RunningSlot, expand_adapters, query_mask
from loraloom.models.samples import sample_key
from loraloom.models.stacking import StackedPlan, Stacker
from loraloom.models.wiring import Wiring
from loraloom.ops.token_loss import token_losses, token_scores
from loraloom.routing.record import LayerRouting

METHODS: dict[str, type[Adapter]] = {"lora": LoraAdapter, "mixlora": MixLoraAdapter}


@dataclass(frozen=True)
class HostOutput:
    """What a forward returns.

    Args:
        logits: [B, L, V] (fewer positions with `logits_to_keep`).
        past_key_values: The cache, if one was asked for.
        loss: The base model's own loss, if labels were given.
        routing: Each mixture's routing by adapter name, one entry a layer, real tokens only.
    """

    logits: Tensor
    past_key_values: Any = None
    loss: Tensor | None = None
    routing: dict[str, list[LayerRouting]] = field(default_factory=dict)


@dataclass(frozen=True)
class HiddenOutput:
    """Hidden states after the final norm, [B, L, D], and the routing record."""

    last_hidden_state: Tensor
    routing: dict[str, list[LayerRouting]]
    past_key_values: Any = None


class Host:
    """A base model that runs rows of different adapters in one batch.

    Args:
        model: A transformers causal LM.
    """

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.adapters: dict[str, Adapter] = {}
        self._family = family_of(model)
        self._base_layers = base_layers(model, self._family)
        self.base = base_info(model, self._family, self._base_layers)
        self._head = head_of(model, self._family)
        self._slot = RunningSlot()
        self._wiring = Wiring(model, self._family, self._slot)
        self._stacker = Stacker()
        self._training = False
        self._checkpointing = False
        self._detached = False
        self._forwards = 0

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype, in which low-rank products run."""
        return self.model.dtype

    @property
    def training(self) -> bool:
        """Whether dropout and jitter are on."""
        return self._training

    def add(self, name: str, config: LoraConfig, seed: int = 0) -> Adapter:
        """Put a new adapter on the base model.

        Args:
            name: A safe file name that is not taken.
            config: Method and settings.
            seed: Of the initial weights.

        Raises:
            ConfigError: If the name is not a safe file name.
            AdapterError: If it is taken, or target modules are not in the base model.
        """
        return self._register(self._build(name, config, seed))

    def load(self, name: str, path_or_hub_id: str | Path) -> Adapter:
        """Put an adapter from files on the base model.

        Args:
            name: A safe file name that is not taken.
            path_or_hub_id: A directory or a hub id, in PEFT's, MoE-PEFT's or loraloom's layout.

        Raises:
            FormatError: If the files can't be read.
            AdapterError: If they don't fit the base model, or the name is taken.
        """
        config, tensors = read_adapter(path_or_hub_id, self.base)
        adapter = self._build(name, config, seed=0)
        adapter.load_tensors(tensors)
        return self._register(adapter)

    def save(
        self,
        name: str,
        directory: str | Path,
        card: str | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        """Write an adapter's files: plain LoRA and DoRA in PEFT's layout, mixtures in MoE-PEFT's.

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
        write_adapter(directory, adapter.config, tensors, self.base, card, overwrite=overwrite)

    def remove(self, name: str) -> None:
        """Take an adapter off and free it.

        Raises:
            AdapterError: If there is none of that name.
        """
        self.adapter(name)
        del self.adapters[name]
        self._stacker.forget()

    def adapter(self, name: str) -> Adapter:
        """Return an adapter.

        Raises:
            AdapterError: If there is none of that name.
        """
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise AdapterError(f"adapter must be one of those on this host ({known}), got {name!r}")
        return self.adapters[name]

    def train(self, mode: bool = True) -> Host:
        """Switch adapters' dropout and jitter on; the base model stays in eval mode.

        Raises:
            ModelError: If the base model is in float16.
        """
        if mode and self.dtype == torch.float16:
            raise ModelError(
                "training needs a base model in bfloat16 or float32, got float16: without loss "
                "scaling small gradients become zero; load it in another dtype"
            )
        self._training = mode
        for adapter in self.adapters.values():
            adapter.train(mode)
        self._wiring.set_checkpointing(self._checkpointing and mode)
        return self

    def eval(self) -> Host:
        """Switch dropout and jitter off."""
        return self.train(False)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute each decoder layer in the backward pass, in training mode.

        Non-reentrant; the base's own dropout stays off.
        """
        self._checkpointing = enabled
        self._wiring.set_checkpointing(enabled and self._training)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: Sequence[str | None] | None = None,
        sample_keys: Sequence[int] | None = None,
        **model_inputs: Any,
    ) -> HostOutput:
        """Run rows of several adapters.

        Args:
            input_ids: Tokens, [B, L].
            attention_mask: 1 at real tokens, [B, L], or [B, past + L] with a cache; None: all are.
            adapters: An adapter's name, or None for the base model, for each row; None: base model.
            sample_keys: A key for each row's dropout in training (see `samples.sample_key`); drawn
                from a count of forwards when left out.
            model_inputs: Passed to the base model: `past_key_values`, `position_ids`, ...

        Raises:
            AdapterError: If `adapters` has another length than the batch or an unknown name.
        """
        forward = self._forward(input_ids, attention_mask, adapters, sample_keys)
        with self._slot.running(forward):
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, **model_inputs)
        return HostOutput(out.logits, _cache_of(out), out.get("loss"), forward.routing)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: Sequence[str | None] | None = None,
        sample_keys: Sequence[int] | None = None,
        token_mask: Tensor | None = None,
        sample_lengths: SampleLengths | None = None,
        **model_inputs: Any,
    ) -> HiddenOutput:
        """Run rows up to the final norm; other arguments and errors as in calling the host.

        Args:
            input_ids: Tokens, [B, L].
            attention_mask: Padding mask, or a mask of your own to add to attention scores.
            adapters: A name or None for each row.
            sample_keys: A key for each sample's dropout, row after row.
            token_mask: 1 at real tokens, [B, L], where the attention mask doesn't say it.
            sample_lengths: Of rows that hold several samples from the left, the samples' tokens;
                they replace both masks and `position_ids`. None: a row is a sample.
            model_inputs: Passed to the base model.

        Raises:
            ModelError: If attention can't keep the samples of a row apart.
        """
        real = attention_mask if token_mask is None else token_mask
        if sample_lengths is not None:
            check_takes_packed_rows(self.config)
            length = input_ids.shape[1]
            real = packed_token_mask(sample_lengths, length).to(self.device)
            positions = packed_positions(sample_lengths, length)
            model_inputs["position_ids"] = positions.to(self.device)
        forward = self._forward(input_ids, real, adapters, sample_keys, sample_lengths)
        model_inputs.setdefault("use_cache", False)
        with self._slot.running(forward):
            out = self.model.base_model(
                input_ids=input_ids, attention_mask=attention_mask, **model_inputs
            )
        return HiddenOutput(out.last_hidden_state, forward.routing, _cache_of(out))

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Map final hidden states [..., D] to logits [..., V], scaled and soft-capped."""
        return self._head(hidden_states)

    def token_losses(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """Compute -log p of each label from the state that predicts it, in chunks.

        Args:
            hidden_states: After the final norm, [N, D].
            labels: Token ids, [N].

        Returns:
            Losses, [N] float32, differentiable with respect to the states.
        """
        return token_losses(hidden_states, labels, self._head, self.config.vocab_size)

    def token_scores(self, hidden_states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log p of each label, [N], and whether it is the most likely token, [N].

        Args:
            hidden_states: After the final norm, [N, D].
            labels: Token ids, [N].
        """
        return token_scores(hidden_states, labels, self._head, self.config.vocab_size)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: Sequence[str | None] | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Generate with transformers' `generate`, each row with its adapter, in the rows' order.

        Args:
            input_ids: Prompts, [B, L], padded on the left.
            attention_mask: 1 at real tokens, [B, L].
            adapters: As in calling the host; beams and returned sequences take their row's.
            generate_kwargs: Passed on: `max_new_tokens`, `num_beams`, `num_return_sequences`, ...
        """
        names = self._row_adapters(adapters, len(input_ids))
        if self._training:
            raise AdapterError("generate needs eval mode: call host.eval() first")
        with self._generating(names):
            return self.model.generate(
                input_ids=input_ids, attention_mask=attention_mask, **generate_kwargs
            )

    def detach(self) -> nn.Module:
        """Take everything off and return the base model as it was before `attach`."""
        self._detached = True
        self._wiring.undo()
        self.adapters.clear()
        self._stacker.forget()
        return self.model

    def _build(self, name: str, config: LoraConfig, seed: int) -> Adapter:
        check_name(name)
        if self._detached:
            raise AdapterError(
                "host must be attached to its model, got a detached one; attach again"
            )
        if name in self.adapters:
            raise AdapterError(f"adapter name {name!r} is taken; remove it or choose another")
        dtype = torch.promote_types(torch.float32, self.dtype)
        with torch.inference_mode(False):  # its tensors could neither be trained nor decode
            return METHODS[config.method](name, config, self._base_layers, dtype, seed)

    def _register(self, adapter: Adapter) -> Adapter:
        self.adapters[adapter.name] = adapter.train(self._training)
        return adapter

    def _row_adapters(
        self, adapters: Sequence[str | None] | None, batch_size: int
    ) -> Sequence[str | None]:
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
        for name in set(names) - {None}:
            self.adapter(name)  # pyright: ignore[reportArgumentType]
        return names

    def _forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        adapters: Sequence[str | None] | None,
        sample_keys: Sequence[int] | None,
        sample_lengths: SampleLengths | None = None,
        *,
        recording: bool = True,
    ) -> RunningForward:
        batch_size, length = input_ids.shape
        names = self._row_adapters(adapters, batch_size)
        keys = None
        if self._training:
            self._forwards += 1
            keys = self._sample_keys(sample_keys, batch_size, sample_lengths)
        mask = query_mask(attention_mask, length)
        layout = make_layout(names, length, mask, keys, self.device, sample_lengths)
        plan = self._stacked_plan(names, layout, length)
        return RunningForward(layout, self.adapters, plan, recording=recording)

    def _stacked_plan(
        self, names: Sequence[str | None], layout: Layout, length: int
    ) -> StackedPlan | None:
        if torch.is_grad_enabled() or self._training or layout.has_padding:
            return None
        rows = [None if name is None else self.adapters[name] for name in names]
        dtype = compute_dtype(self.dtype, self.device)
        return self._stacker.plan(rows, length, dtype, self.device)

    def _sample_keys(
        self, keys: Sequence[int] | None, batch_size: int, lengths: SampleLengths | None
    ) -> list[int]:
        count, what = batch_size, "rows"
        if lengths is not None:
            count, what = sum(map(len, lengths)), "samples"
        if keys is None:
            return [sample_key(0, self._forwards, place) for place in range(count)]
        if len(keys) != count:
            raise AdapterError(
                f"sample_keys must have one key for each of the {count} {what}, got {len(keys)}"
            )
        return [int(key) for key in keys]

    @contextmanager
    def _generating(self, adapters: Sequence[str | None]) -> Iterator[None]:
        """Give every forward inside transformers' generation loop its layout."""
        own_forward = self.model.__dict__.get("forward")
        base_forward = self.model.forward

        @wraps(base_forward)  # generate asks what a forward takes
        def forward(*args: Any, **kwargs: Any) -> Any:
            tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
            names = expand_adapters(adapters, len(tokens))
            mask = kwargs.get("attention_mask")
            running = self._forward(tokens, mask, names, None, recording=False)
            with self._slot.running(running):
                return base_forward(*args, **kwargs)

        self.model.forward = forward
        try:
            yield
        finally:
            del self.model.__dict__["forward"]
            if own_forward is not None:
                self.model.forward = own_forward


def _cache_of(output: Any) -> Any:
    """Return the key-value cache, whose field changed its name within transformers 5."""
    present = [name for name in ("cache", "past_key_values") if name in output.keys()]  # noqa: SIM118
    return output[present[0]] if present else None
