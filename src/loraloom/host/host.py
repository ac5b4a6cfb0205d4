"""Forwards of a frozen base model whose rows have different adapters.

Axes: B batch, L sequence, N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.contract import Adapter, AdapterConfig
from loraloom.adapters.routed.method import add_experts
from loraloom.base.families import FAMILIES
from loraloom.base.sharding import decoder_of
from loraloom.base.structure import max_positions, text_config
from loraloom.config.data import PromptForm
from loraloom.distributed import Alone, Ranks
from loraloom.errors import ModelError, names_in
from loraloom.formats.files import read_stored, write_adapter
from loraloom.formats.layouts import StoredAdapter
from loraloom.host.choice import Choice, choose
from loraloom.host.decoding import Decoding, Sessions
from loraloom.host.forwards import ForwardRequest, Forwards, HostOutput, ModelInput
from loraloom.host.heads import Heads
from loraloom.host.layout import (
    RowAdapter,
    RowAdapters,
    SampleLengths,
    is_padded_at_ends,
    packed_rows,
)
from loraloom.host.outer_forward import AdapterModel, OuterForward, Rows
from loraloom.host.prepared_weights import PreparedWeights, Record
from loraloom.host.registry import AdapterRegistry, describe
from loraloom.host.trial import PackingTrial, try_adapters, try_attention


def attach(model: nn.Module) -> Host:
    """Freeze a transformers causal LM in place and return a host that adapters can be added to.

    Raises:
        ModelError: If `model` is no causal LM, is not supported, or is attached already.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"attach() requires a causal LM of transformers, got {type(model).__name__}; load a "
            "model by name with loraloom.load_base_model()"
        )
    return Host(model)


class Host:
    """A base model with adapters, which runs rows of different adapters in one batch.

    Forwards run in eval mode unless you pass `training=True`. Threads may share a host: they take
    turns in the base model and in changing the host, and each has its own mode. A forward runs with
    the adapters that are on the host when it starts.

    Attributes:
        model: The base model, a transformers causal LM.
        base: The description of the base model that adapter files contain.
        adapters: The adapters on the base model, by name; `add` and `remove` change them.
        ranks: The processes that share the rows in training; by default only this process.
        training: Whether forwards of this thread train by default.
        gradient_checkpointing: Whether training forwards recompute decoder layers in the backward
            pass.
    """

    def __init__(self, model: nn.Module):
        lock = threading.RLock()
        self._registry = AdapterRegistry(model, lock)
        self.model: Any = model
        self.base = self._registry.base
        self.ranks: Ranks = Alone()
        self.default_form: PromptForm | None = None  # of rows whose adapter has none
        self.gradient_checkpointing = False
        undo = self._registry.wiring.undo
        self.forwards = Forwards(self._registry, lock, decoder_of(model, undo), self.choose)
        self.heads = Heads(self._registry, self.forwards.thread)
        self._sessions = Sessions(self.forwards, self.heads)
        self.outer_forward = OuterForward(self, model)
        undo.callback(vars(model).pop, "_call_impl")
        self.packing = PackingTrial(self)
        try:
            try_attention(self)
            if self.base.model_type not in FAMILIES:
                try_adapters(self)
        except BaseException:  # leaves a model as it was that adapters can't be added to
            self.detach()
            raise

    def __repr__(self) -> str:
        adapters = [describe(adapter) for adapter in self.adapters.values()]
        merged = f", merged: {self.merged}" if self.merged else ""
        base = f"{self.base.name_or_path or self.base.model_type}, {self.dtype}"
        return f"Host({base}, adapters: {names_in(adapters, 8) or 'none'}{merged})"

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        return self._registry.hosted.adapters

    @property
    def training(self) -> bool:
        return self.forwards.thread.training

    @property
    def config(self) -> Any:
        """The configuration of the base model, or of its text part if it has others."""
        return text_config(self.model)

    @property
    def max_positions(self) -> int:
        """The length to which rows are decoded."""
        return max_positions(self.config)

    @property
    def device(self) -> torch.device:
        return self.forwards.device

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype, in which low-rank products run."""
        return self.model.dtype

    def add(self, name: str, config: AdapterConfig, seed: int = 0) -> Adapter:
        """Add a new adapter. Its initial weights depend only on `seed` and the tensors' names.

        Raises:
            ConfigError: If the name is no safe file name, or the configuration is not loraloom's.
            AdapterError: If the name is taken, or the base model lacks a target module.
        """
        return self._registry.add(name, config, seed)

    def add_experts(self, adapter: str, experts: Mapping[str, str], *, name: str) -> Adapter:
        """Make a new routed adapter from the experts of an existing one and further experts.

        Existing experts and their routers keep their weights exactly. The routers of new experts
        start fresh: `fit_router(..., only=[...])` fits them if the router reads prompts, and in
        training `lr_ratios` freezes the others.

        Args:
            adapter: Name of the existing routed adapter, which stays.
            experts: New experts by name: directories, Hub IDs, or names of adapters on the host.
            name: Name of the new adapter.
        """
        source = self._registry.get(adapter)
        extended = self.add(name, add_experts(source.config, experts))
        extended.load_tensors({**extended.tensors(), **source.tensors()})
        if not extended.forms_differ:
            extended.prompt = source.prompt
        return extended

    def choose(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[RowAdapter]
    ) -> list[Choice]:
        """Return which adapter answers each prompt, a list of token IDs: the router's choice."""
        return choose(self, prompts, adapters)

    def load(
        self, name: str, path_or_hub_id: str | Path, settings: Mapping[str, Any] | None = None
    ) -> Adapter:
        """Load an adapter from files in the layout of PEFT, MoE-PEFT, axolotl or loraloom.

        `settings`, for example `{"top_k": 2}`, supply what the files lack, or override what they
        have.

        Raises:
            FormatError: If the files cannot be read.
            AdapterError: If the adapter does not fit the base model, or the name is taken.
        """
        return self.load_stored(name, read_stored(path_or_hub_id, settings))

    def load_stored(self, name: str, stored: StoredAdapter) -> Adapter:
        """Load an adapter from files that were read; errors as in `load`."""
        return self._registry.load(name, stored)

    def save(
        self, name: str, directory: str | Path, card: str | None = None, *, overwrite: bool = False
    ) -> None:
        """Write an adapter's files in the layout of its method, with `card` as README.md.

        If `directory` contains an adapter, pass `overwrite=True` to replace it.
        """
        adapter = self._registry.get(name)
        write_adapter(
            directory,
            adapter.config,
            adapter.tensors(),
            self.base,
            card,
            prompt=adapter.prompt,
            overwrite=overwrite,
        )

    def adapter(self, name: str) -> Adapter:
        """Return an adapter or a sum by name, or raise an AdapterError."""
        return self._registry.find(name)

    def remove(self, name: str) -> None:
        """Remove an adapter and free its memory."""
        self._registry.remove(name)

    def combine(self, adapters: Sequence[str], weights: Sequence[float], *, name: str) -> Adapter:
        """Make a new LoRA that is the exact weighted sum of several.

        A and B are concatenated, as in PEFT's `add_weighted_adapter` with `cat`. Ranks and
        projections may differ; the new rank is the sum of the ranks.

        Args:
            adapters: Names of the adapters to combine, which stay.
            weights: Factors for the update of each adapter; they may be negative.
            name: Name of the new adapter.
        """
        return self._registry.combine(name, adapters, weights)

    @property
    def merged(self) -> str | None:
        """The name of the adapter that is merged into the base model, or None."""
        return self._registry.merged_name

    def merge(self, name: str) -> float:
        """Merge an adapter into the base model; return the share of the update lost to rounding.

        Rows without an adapter then use the merged one, at the speed of the base model, and other
        adapters add to it. The original weights stay on the CPU. Until `unmerge`, nothing trains,
        and earlier decoding sessions must not continue.

        Raises:
            AdapterError: If the adapter has routers, another is merged, or the base model is
                quantized. The base model is unchanged then.
        """
        return self._registry.merge(name)

    def unmerge(self, name: str) -> None:
        """Restore the base model's original weights exactly."""
        self._registry.unmerge(name)

    def detach(self) -> nn.Module:
        """Remove all adapters and return the base model as it was before `attach`."""
        self._registry.detach()
        return self.model

    def train(self, mode: bool = True) -> Host:
        """Make this thread's forwards train by default, with dropout and jitter.

        If the base model is in float16, scale the loss (`torch.amp.GradScaler`).
        """
        if mode:
            self._registry.check_unmerged("train")
        self.forwards.thread.training = mode
        return self

    def eval(self) -> Host:
        return self.train(False)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Recompute decoder layers in the backward pass of training forwards, to save memory."""
        self.gradient_checkpointing = enabled

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: RowAdapters = None,
        sample_keys: Sequence[int] | None = None,
        training: bool | None = None,
        **model_inputs: ModelInput,
    ) -> HostOutput:
        """Run rows of several adapters.

        Args:
            input_ids: Tokens, [B, L].
            attention_mask: 1 at real tokens, [B, L], or [B, past + L] with a cache; None: all are.
                On an accelerator, a mask on the CPU avoids waiting for the device.
            adapters: For each row an adapter's name, `(name, scale)` to scale what it adds to the
                base model, or None for the base model. Default: the base model for all rows.
            sample_keys: Integers that determine each row's dropout in training; by default
                torch's generator draws them.
            training: Whether this forward uses dropout and jitter.
            **model_inputs: Further inputs of the base model: `past_key_values`, `position_ids`, …
        """
        request = ForwardRequest(input_ids, adapters, attention_mask, model_inputs, sample_keys)
        return self._run(self.model, request, attention_mask, training)

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: RowAdapters = None,
        sample_keys: Sequence[int] | None = None,
        token_mask: Tensor | None = None,
        sample_lengths: SampleLengths | None = None,
        training: bool | None = None,
        **model_inputs: ModelInput,
    ) -> HostOutput:
        """Run rows up to the final norm; other arguments are those of a call of the host.

        Args:
            attention_mask: Padding mask, or a mask to add to attention scores.
            sample_keys: Integers that determine each sample's dropout, row after row.
            token_mask: 1 at real tokens, [B, L], if the attention mask is no padding mask.
            sample_lengths: Tokens of each sample in rows that contain several from the left; they
                replace both masks and `position_ids`. None: a row is a sample.
        """
        if token_mask is None:
            token_mask = attention_mask
        if sample_lengths is not None:
            self.packing.check()
            positions, token_mask = packed_rows(sample_lengths, *input_ids.shape)
            model_inputs["position_ids"] = positions.to(self.device)
            attention_mask = None  # with it transformers would let samples see each other
        elif is_padded_at_ends(attention_mask):
            attention_mask = None  # real tokens see no later ones, and attention is faster without
        model_inputs = {"use_cache": False, **model_inputs}
        request = ForwardRequest(
            input_ids, adapters, token_mask, model_inputs, sample_keys, sample_lengths
        )
        return self._run(self.forwards.run_decoder, request, attention_mask, training)

    def _run(
        self,
        compute: Callable[..., Any],
        request: ForwardRequest,
        attention_mask: Tensor | None,
        training: bool | None,
    ) -> HostOutput:
        request = replace(
            request,
            training=self.training if training is None else training,
            checkpointing=self.gradient_checkpointing,
            record={},
        )
        if attention_mask is not None:
            attention_mask = attention_mask.to(self.device)
        with self.forwards.run(request) as (forward, inputs):
            output = compute(input_ids=request.input_ids, attention_mask=attention_mask, **inputs)
        return HostOutput(
            logits=output.get("logits"),
            last_hidden_state=output.get("last_hidden_state"),
            # The cache's field changed its name within transformers 5.
            past_key_values=output.get("cache", output.get("past_key_values")),
            loss=output.get("loss"),
            routing=forward.joined_routing(),
            samples=forward.samples(),
        )

    def auxiliary_loss(self, output: HostOutput) -> Tensor:
        """Sum the auxiliary losses of the adapters in a forward with `training=True`.

        They are the routers' load-balance loss, z-loss or entropy, with their coefficients, and
        what else methods define. Add the sum to your loss, as `loraloom train` does.
        """
        loss = self.heads.auxiliary_loss(output.routing, output.samples)
        return torch.zeros((), device=self.device) if loss is None else loss

    def prepared(self) -> AbstractContextManager[None]:
        """Keep prepared weights over several forwards of this thread without gradients.

        Do not change weights inside the context.
        """
        thread = self.forwards.thread
        return thread.using(thread.prepared or PreparedWeights())

    def logits(self, hidden_states: Tensor, adapters: RowAdapters = None) -> Tensor:
        """Map final hidden states [N, …, D] to logits [N, …, V], scaled and soft-capped.

        `adapters` names the adapter of each state, because adapters may have separate heads.
        """
        return self.heads.logits(hidden_states, adapters)

    def token_losses(
        self, hidden_states: Tensor, labels: Tensor, adapters: RowAdapters = None
    ) -> Tensor:
        """Compute -log p of each label, [N], from the state that predicts it, [N, D], in chunks.

        The losses, [N] in float32, have gradients for the states and the adapters' heads.
        """
        return self.heads.token_losses(hidden_states, labels, adapters)

    def token_scores(
        self, hidden_states: Tensor, labels: Tensor, adapters: RowAdapters = None, num_top: int = 0
    ) -> Sequence[Tensor]:
        """Compute log p of each label, [N], and whether it is the most likely token, [N].

        With them come log p of the `num_top` most likely tokens in its place, [N, K], and their
        ids, [N, K]. Arguments are those of `token_losses`.
        """
        return self.heads.token_scores(hidden_states, labels, adapters, num_top)

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: RowAdapters = None,
        prepared: PreparedWeights | None = None,
        record: Record | None = None,
    ) -> Decoding:
        """Read prompts, padded on the left, and return a session with the next tokens' logits.

        `session.keep` keeps some rows, `session.join` appends those of another session. Weights
        must not change during a session; `prepared` are prepared weights to share with others.
        The mask is read on the CPU. `record` collects the routers' decisions by adapter name.
        """
        return self._sessions.prefill(input_ids, attention_mask, adapters, prepared, record)

    def decode(self, session: Decoding, tokens: Tensor, record: Record | None = None) -> Tensor:
        """Append a token to each row of a session, [B]; return the next logits, [B, V]."""
        return self.extend(session, tokens.unsqueeze(1), record)

    def extend(self, session: Decoding, input_ids: Tensor, record: Record | None = None) -> Tensor:
        """Append tokens to each row of a session, [B, L]; return the next logits, [B, V]."""
        return self._sessions.extend(session, input_ids, record)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: RowAdapters = None,
        **generate_kwargs: object,
    ) -> Any:
        """Call transformers' `generate` with its arguments, each row with its adapter.

        Pad prompts, [B, L], on the left. Beams and returned sequences use the adapter of their
        row.

        Args:
            input_ids: Tokens of the prompts, [B, L].
            attention_mask: 1 at real tokens, [B, L].
            adapters: Adapters of the rows, as in a call of the host.
            **generate_kwargs: Other arguments of transformers' `generate`, such as
                `max_new_tokens` and `streamer`.
        """
        self._registry.rows(adapters, len(input_ids))  # raises if they don't fit
        rows = Rows([None] if adapters is None else list(adapters))
        with self.prepared(), self.outer_forward.of_rows(rows):
            return self.model.generate(
                input_ids=input_ids, attention_mask=attention_mask, **generate_kwargs
            )

    def as_model(self, name: str | None) -> AdapterModel:
        """Return an adapter, or the base model, as a separate model for Trainer and trl."""
        return AdapterModel(self, name)
