"""One frozen base model and the adapters on it.

Axes: B batch, L sequence, N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.adapter import Adapter
from loraloom.adapters.config import AdapterConfig, check_config
from loraloom.adapters.own import own_parts
from loraloom.config.fields import check_name
from loraloom.errors import AdapterError, DataError, ModelError
from loraloom.formats.card import model_card
from loraloom.formats.files import read_adapter, write_adapter
from loraloom.formats.hub import upload_adapter
from loraloom.models.autocast import compute_dtype
from loraloom.models.combining import Combination, combine
from loraloom.models.decoding import Decoding, make_cache
from loraloom.models.door import Door, Rows, Visit, expand_adapters, nobody
from loraloom.models.families import base_info, base_layers, head_of, text_config
from loraloom.models.forward import (
    ForwardContext,
    PreparedWeights,
    Record,
    current_forward,
    query_mask,
    running,
    segment_adapters,
)
from loraloom.models.heads import Head, Heads
from loraloom.models.layout import Layout, RowAdapter, make_layout
from loraloom.models.merging import Merged, MergeError
from loraloom.models.own import build_own_modules
from loraloom.models.packing import (
    SampleLengths,
    check_takes_packed_rows,
    packed_positions,
    packed_token_mask,
)
from loraloom.models.samples import draw_sample_keys, sample_key
from loraloom.models.sharding import decoder_of, recovering
from loraloom.models.stacking import ScaledAdapter, StackedForward
from loraloom.models.structure import family_of
from loraloom.models.trial import try_adapters
from loraloom.models.view import AdapterModel
from loraloom.models.wiring import Wiring
from loraloom.ops.token_loss import token_losses, token_scores, top_tokens, trained_token_losses
from loraloom.ranks import Alone, Ranks
from loraloom.routing.record import LayerRouting, join_routing

_prepared: ContextVar[tuple[object, PreparedWeights] | None] = ContextVar(
    "loraloom_prepared", default=None
)


@dataclass(frozen=True)
class HostOutput:
    """What a forward returns.

    Args:
        logits: [B, L, V] (fewer positions with `logits_to_keep`).
        past_key_values: The cache, if one was asked for.
        loss: The base model's own loss, if labels were given.
        routing: Each mixture's routing by adapter name, an entry for each router, real tokens only;
            those of rows with one scale before those with the next.
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

    Forwards are in eval mode unless they say `training=True`. Several threads may use a host: one
    at a time is inside the base model, and none sees another's adapters or mode.

    Args:
        model: A transformers causal LM.

    Attributes:
        adapters: Those on it, by name.
        ranks: The processes that share its rows in training; this one alone by default.

    Raises:
        ModelError: If the family is not supported, a model that looks like one computes something
            else, or the model is attached or compiled already.
    """

    def __init__(self, model: nn.Module):
        self.model: Any = model
        self.adapters: dict[str, Adapter] = {}
        self.ranks: Ranks = Alone()
        self._family = family_of(model)
        self._base_layers = base_layers(model, self._family)
        self.base = base_info(model, self._family, self._base_layers)
        self._decoder = decoder_of(model)
        head = head_of(model, self._family)
        self._heads = Heads(self.model.get_output_embeddings(), self.base.head, head)
        self._wiring = Wiring(model, self._family)
        self._generation = self.door(model)
        self._inside = threading.RLock()
        self._cache_argument = _cache_argument(self.model.base_model)
        self._training = False
        self._checkpointing = False
        self._detached = False
        self._merged: Merged | None = None
        self._forwards = 0
        if not self._family.in_table:
            self._try()

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
        batches: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> Adapter:
        """Put a new adapter on the base model.

        Args:
            name: A safe file name that is not taken.
            config: Method and settings.
            seed: Of the initial weights.
            batches: Training data for methods whose initial weights depend on it: `input_ids`,
                `attention_mask` and `labels` of some rows each, [B, L].

        Raises:
            ConfigError: If the name is not a safe file name, or the configuration not loraloom's.
            AdapterError: If it is taken, or target modules are not in the base model.
        """
        self._check_unmerged("start an adapter")
        start: dict[str, Tensor] = {}
        if check_config(config).starts_from_data:
            self._check_new(name)
            if batches is None:
                raise AdapterError(
                    f"adapter {name!r} starts from training data, got none; give batches, or train "
                    "it by a run file"
                )
            config, start = config.started(self.model, batches, self.base)
        adapter = self._build(name, config, seed)
        adapter.load_start(start)
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
            AdapterError: If they don't fit the base model, or the name is taken.
        """
        config, tensors = read_adapter(path_or_hub_id, self.base, settings)
        adapter = self._build(name, config, seed=0)
        adapter.load_stored(tensors)
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
        card = model_card(self.adapter(name).config, self.base, name=name, results=results)
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
        adapter.load_tensors(tensors)
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

    @property
    def training(self) -> bool:
        """Whether forwards that don't say train."""
        return self._training

    def train(self, mode: bool = True) -> Host:
        """Let forwards that don't say train, with dropout and jitter on.

        Where the base model is in float16, the loss must be scaled (`torch.amp.GradScaler`).

        Raises:
            AdapterError: If an adapter is merged.
        """
        if mode:
            self._check_unmerged("train")
        self._training = mode
        return self

    def eval(self) -> Host:
        """Let forwards that don't say be in eval mode."""
        return self.train(False)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Let forwards that train recompute each decoder layer in the backward pass.

        Non-reentrant; the base's own dropout stays off.
        """
        self._checkpointing = enabled

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether forwards that train recompute decoder layers in the backward pass."""
        return self._checkpointing

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Keep compute forms of the weights over this thread's forwards without gradients.

        They are made once, when first needed. Inside, weights must not be changed; outside, every
        forward computes from the parameters as they are.
        """
        outer = _prepared.get()
        if outer is not None and outer[0] is self:
            yield
            return
        token = _prepared.set((self, PreparedWeights()))
        try:
            yield
        finally:
            _prepared.reset(token)

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: Sequence[RowAdapter] | None = None,
        sample_keys: Sequence[int] | None = None,
        training: bool | None = None,
        **model_inputs: Any,
    ) -> HostOutput:
        """Run rows of several adapters.

        Args:
            input_ids: Tokens, [B, L].
            attention_mask: 1 at real tokens, [B, L], or [B, past + L] with a cache; None: all are.
                On an accelerator, one that lies on the CPU spares waiting for the device.
            adapters: For each row an adapter's name, `(name, scale)` to scale what it adds to the
                base model, or None for the base model; None: base model.
            sample_keys: A key for each row's dropout in training (see `samples.sample_key`); drawn
                from a count of forwards when left out.
            training: Dropout and jitter are on, for this forward.
            model_inputs: Passed to the base model: `past_key_values`, `position_ids`, ...

        Raises:
            AdapterError: If `adapters` has another length than the batch or an unknown name.
            ModelError: If it fills a cache and layers are to be recomputed.
        """
        record: Record = {}
        forward = self._forward(
            input_ids, attention_mask, adapters, sample_keys, training=training, record=record
        )
        if forward.checkpointing:
            model_inputs.setdefault("use_cache", False)
            self._check_fills_no_cache(model_inputs)
        with self._run(forward):
            out = self.model(
                input_ids=input_ids, attention_mask=self._moved(attention_mask), **model_inputs
            )
        return HostOutput(out.logits, _cache_of(out), out.get("loss"), _filled(record))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: Sequence[RowAdapter] | None = None,
        sample_keys: Sequence[int] | None = None,
        token_mask: Tensor | None = None,
        sample_lengths: SampleLengths | None = None,
        training: bool | None = None,
        **model_inputs: Any,
    ) -> HiddenOutput:
        """Run rows up to the final norm; other arguments and errors as in calling the host.

        Args:
            input_ids: Tokens, [B, L].
            attention_mask: Padding mask, or a mask of your own to add to attention scores.
            adapters: As in calling the host.
            sample_keys: A key for each sample's dropout, row after row.
            token_mask: 1 at real tokens, [B, L], where the attention mask doesn't say it.
            sample_lengths: Of rows that hold several samples from the left, the samples' tokens;
                they replace both masks and `position_ids`. None: a row is a sample.
            training: Dropout and jitter are on, for this forward.
            model_inputs: Passed to the base model.

        Raises:
            ModelError: If attention can't keep the samples of a row apart, and as above.
        """
        real = attention_mask if token_mask is None else token_mask
        if sample_lengths is not None:
            check_takes_packed_rows(self.config)
            length = input_ids.shape[1]
            real = packed_token_mask(sample_lengths, length)
            positions = packed_positions(sample_lengths, length)
            model_inputs["position_ids"] = positions.to(self.device)
        record: Record = {}
        forward = self._forward(
            input_ids, real, adapters, sample_keys, sample_lengths, training=training, record=record
        )
        model_inputs.setdefault("use_cache", False)
        if forward.checkpointing:
            self._check_fills_no_cache(model_inputs)
        with self._run(forward):
            out = self._decoder(
                input_ids=input_ids, attention_mask=self._moved(attention_mask), **model_inputs
            )
        return HiddenOutput(out.last_hidden_state, _filled(record), _cache_of(out))

    def logits(self, hidden_states: Tensor, adapters: Sequence[RowAdapter] | None = None) -> Tensor:
        """Map final hidden states [N, …, D] to logits [N, …, V], scaled and soft-capped.

        Args:
            hidden_states: After the final norm.
            adapters: Of each state, where some may have a head of their own, as in calling the
                host; None: the base model's head for all.
        """
        return self._by_head(_logits, [hidden_states], adapters)[0]

    def token_losses(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        adapters: Sequence[RowAdapter] | None = None,
    ) -> Tensor:
        """Compute -log p of each label from the state that predicts it, in chunks.

        Args:
            hidden_states: After the final norm, [N, D].
            labels: Token ids, [N].
            adapters: Of each state, as in `logits`.

        Returns:
            Losses, [N] float32, differentiable with respect to the states and adapters' heads.
        """

        def compute(head: Head, states: Tensor, targets: Tensor) -> list[Tensor]:
            is_trained = head.is_own and torch.is_grad_enabled()
            losses = trained_token_losses if is_trained else token_losses
            return [losses(states, targets, head, self.config.vocab_size)]

        return self._by_head(compute, [hidden_states, labels], adapters)[0]

    def token_scores(
        self,
        hidden_states: Tensor,
        labels: Tensor,
        adapters: Sequence[RowAdapter] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute log p of each label, [N], and whether it is the most likely token, [N].

        Args:
            hidden_states: After the final norm, [N, D].
            labels: Token ids, [N].
            adapters: Of each state, as in `logits`.
        """

        def compute(head: Head, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            return token_scores(states, targets, head, self.config.vocab_size)

        log_probs, is_top = self._by_head(compute, [hidden_states, labels], adapters)
        return log_probs, is_top

    def top_tokens(
        self,
        hidden_states: Tensor,
        num_top: int,
        adapters: Sequence[RowAdapter] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute log p of the most likely next tokens, [N, K], and their ids, [N, K].

        Args:
            hidden_states: After the final norm, [N, D].
            num_top: K.
            adapters: Of each state, as in `logits`.
        """
        vocab_size = self.config.vocab_size

        def compute(head: Head, states: Tensor) -> tuple[Tensor, Tensor]:
            return top_tokens(states, head, vocab_size, min(num_top, vocab_size))

        log_probs, ids = self._by_head(compute, [hidden_states], adapters)
        return log_probs, ids

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: Sequence[RowAdapter] | None = None,
        prepared: PreparedWeights | None = None,
        record: Record | None = None,
    ) -> Decoding:
        """Read prompts, as the first step of a decoding session.

        Args:
            input_ids: Prompts, [B, L], padded on the left.
            attention_mask: 1 at real tokens, [B, L], best on the CPU, where it is read; None: all
                are.
            adapters: As in calling the host.
            prepared: Takes the weights in compute form; by default they are the session's own.
            record: Takes what routers do, by adapter name.

        Returns:
            A session with the logits of each row's next token. It keeps the weights as they are
            now; its rows may go (`keep`), and those of another session join it (`join`).

        Raises:
            AdapterError: As in calling the host.
            DataError: If prompts are not padded on the left.
        """
        mask = torch.ones(input_ids.shape, dtype=torch.long)
        if attention_mask is not None:
            mask = attention_mask.cpu()
        if not bool((mask.long().diff(dim=1) >= 0).all() and mask[:, -1].all()):
            raise DataError(
                "prompts must be padded on the left, so that all of them end at the last column; "
                "got an attention_mask with 0 behind 1"
            )
        names = list(self._row_adapters(adapters, len(input_ids)))
        cache = make_cache(self.config)
        session = Decoding(names, mask, cache, prepared or PreparedWeights())
        self._advance(session, input_ids, mask.cumsum(1).sub(1).clamp_min(0), mask, record)
        return session

    def decode(self, session: Decoding, tokens: Tensor, record: Record | None = None) -> Tensor:
        """Continue every row of a session by a token.

        Args:
            session: Of this host.
            tokens: The rows' next tokens, [B].
            record: Takes what routers do, by adapter name.

        Returns:
            Logits of the tokens after these, [B, V].
        """
        return self.extend(session, tokens.unsqueeze(1), record)

    def extend(self, session: Decoding, input_ids: Tensor, record: Record | None = None) -> Tensor:
        """Continue every row of a session by the same number of tokens.

        Args:
            session: Of this host.
            input_ids: The rows' next tokens, [B, L].
            record: Takes what routers do, by adapter name.

        Returns:
            Logits of the tokens after the last ones, [B, V].
        """
        added = torch.arange(input_ids.shape[1])
        positions = session.lengths.unsqueeze(1) + added
        ones = session.attention_mask.new_ones(input_ids.shape)
        mask = torch.cat([session.attention_mask, ones], dim=1)
        self._advance(session, input_ids, positions, mask, record)
        return session.logits

    @torch.no_grad()
    def _advance(
        self,
        session: Decoding,
        input_ids: Tensor,
        position_ids: Tensor,
        mask: Tensor,
        record: Record | None = None,
    ) -> None:
        """Run tokens of a session; its logits become those after the last one of each row.

        Positions and mask are on the CPU. A mask of ones is left out, as transformers would ask the
        device for it and then leave it out.
        """
        forward = self._forward(
            input_ids,
            mask,
            session.adapters,
            training=False,
            record=record,
            prepared=session.prepared,
        )
        with self._run(forward):
            out = self._decoder(
                input_ids=input_ids,
                attention_mask=None if bool(mask.all()) else self._moved(mask),
                position_ids=position_ids.to(self.device),
                use_cache=True,
                **{self._cache_argument: session.cache},
            )
        session.attention_mask = mask
        states = out.last_hidden_state[:, -1].contiguous()
        (session.logits,) = self._by_head(_logits, [states], session.adapters, session.prepared)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: Sequence[RowAdapter] | None = None,
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
        with self.prepared(), self._generation.of_rows(Rows(names)):
            return self.model.generate(
                input_ids=input_ids, attention_mask=attention_mask, **generate_kwargs
            )

    def door(self, module: nn.Module, rows: Callable[[], Rows | None] = nobody) -> Door:
        """Let forwards that others make of a module run adapters, until `detach`; see door.py.

        Args:
            module: One that calls the base model, or the base model itself.
            rows: Says whose the rows are; None: the base model's.
        """
        door = Door(module, self._visit, rows)
        self._wiring.on_undo(door.undo)
        return door

    def as_model(self, name: str | None) -> AdapterModel:
        """Show an adapter, or the base model, as a model of its own, for trainers of others.

        Raises:
            AdapterError: If there is no such adapter.
        """
        return AdapterModel(self, name)

    def detach(self) -> nn.Module:
        """Take everything off and return the base model as it was before `attach`."""
        self._detached = True
        if self.merged is not None:
            self.unmerge(self.merged)
        self._wiring.undo()
        self.adapters.clear()
        return self.model

    def _try(self) -> None:
        """Leave a model as it was that adapters can't be added to."""
        try:
            try_adapters(self)
        except ModelError:
            self.detach()
            raise
        self._forwards = 0

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

    def _forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        adapters: Sequence[RowAdapter] | None,
        sample_keys: Sequence[int] | None = None,
        sample_lengths: SampleLengths | None = None,
        *,
        training: bool | None = None,
        record: Record | None = None,
        prepared: PreparedWeights | None = None,
    ) -> ForwardContext:
        """Make the context of a forward, at the door."""
        batch_size, length = input_ids.shape
        names = self._row_adapters(adapters, batch_size)
        training = self._training if training is None else training
        keys = None
        if training:
            self._check_unmerged("train")
            self._forwards += 1
            keys = self._sample_keys(sample_keys, batch_size, sample_lengths)
        mask = query_mask(attention_mask, length)
        layout = make_layout(names, length, mask, keys, self.device, sample_lengths)
        forward = ForwardContext(
            self._wiring,
            layout,
            segment_adapters(layout, self.adapters),
            training=training,
            checkpointing=training and self._checkpointing,
            record=record,
            prepared=self._prepared_here() if prepared is None else prepared,
        )
        return self._stacked(forward, names, length)

    def _stacked(
        self, forward: ForwardContext, names: Sequence[RowAdapter], length: int
    ) -> ForwardContext:
        """Have a small forward computed by stacks, where weights are prepared."""
        prepared = forward.prepared
        if prepared is None or forward.training or torch.is_grad_enabled():
            return forward
        if forward.layout.has_padding or not forward.has_adapters:
            return forward
        rows = tuple(None if name is None else self._scaled(name) for name in names)
        dtype = compute_dtype(self.dtype, self.device)
        plan = prepared.plan(rows, length, dtype, self.device)
        if plan is None:
            return forward
        return replace(forward, stacked=StackedForward(plan, forward.recorder))

    def _moved(self, mask: Tensor | None) -> Tensor | None:
        """Bring a mask to where the base model takes it."""
        return None if mask is None else mask.to(self.device)

    def _scaled(self, adapter: str | tuple[str, float]) -> ScaledAdapter:
        name, scale = (adapter, 1.0) if isinstance(adapter, str) else adapter
        return self.adapters[name], scale

    def _by_head(
        self,
        compute: Callable[..., Sequence[Tensor]],
        tensors: Sequence[Tensor],
        adapters: Sequence[RowAdapter] | None,
        prepared: PreparedWeights | None = None,
    ) -> Sequence[Tensor]:
        """Compute something of states with each one's head; see `Heads.each`."""
        rows: Sequence[ScaledAdapter | None] = ()
        heads = (adapter.own_at(self.base.head) for adapter in self.adapters.values())
        if adapters is not None and any(head is not None for head in heads):
            names = self._row_adapters(adapters, len(tensors[0]))
            rows = [None if name is None else self._scaled(name) for name in names]
        return self._heads.each(compute, tensors, rows, prepared or self._prepared_here())

    def _prepared_here(self) -> PreparedWeights | None:
        """Return what a `with host.prepared():` of this thread keeps."""
        kept = _prepared.get()
        return kept[1] if kept is not None and kept[0] is self else None

    @contextmanager
    def _run(self, forward: ForwardContext) -> Iterator[None]:
        """Be inside the base model, alone."""
        with self._inside, running(forward), recovering(self.model):
            yield

    def _visit(self, tokens: Tensor, attention_mask: Tensor | None, rows: Rows) -> Visit | None:
        """Open a forward that somebody else makes."""
        if current_forward(self._wiring) is not None:
            return None
        if rows.training:
            self._check_needs_no_scaling()
        record: Record = {}
        forward = self._forward(
            tokens,
            attention_mask,
            expand_adapters(rows.adapters, len(tokens)),
            draw_sample_keys(len(tokens)) if rows.training else None,
            training=rows.training,
            record=record if rows.training else None,
        )
        return Visit(self._run(forward), lambda: self._auxiliary_loss(record, forward.layout))

    def _auxiliary_loss(self, record: Record, layout: Layout) -> Tensor | None:
        """Add up what adapters add to the objective; None for nothing."""
        losses = [
            self.adapters[name].auxiliary_loss(routing, layout.sample_tokens(name))
            for name, routing in _filled(record).items()
        ]
        present = [loss for loss in losses if loss is not None]
        return torch.stack(present).sum() if present else None

    def _check_needs_no_scaling(self) -> None:
        """Refuse a base model whose trainer would have to scale its loss: nobody can tell."""
        if self.dtype == torch.float16:
            raise ModelError(
                "training by other programs needs a base model in bfloat16 or float32, got "
                "float16: without loss scaling small gradients become zero; load it in another "
                "dtype, or train with loraloom, which scales losses"
            )

    def _check_unmerged(self, purpose: str) -> None:
        if self.merged is not None:
            raise AdapterError(
                f"the base model must be without a merged adapter to {purpose}, it has "
                f"{self.merged!r} in its weights; unmerge it first"
            )

    def _check_fills_no_cache(self, model_inputs: Mapping[str, Any]) -> None:
        """Refuse a cache that a recomputed layer would fill a second time."""
        if model_inputs["use_cache"] or model_inputs.get(self._cache_argument) is not None:
            raise ModelError(
                f"a forward with gradient checkpointing fills no cache: leave use_cache and "
                f"{self._cache_argument} out, or call enable_gradient_checkpointing(False)"
            )

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


def _logits(head: Head, states: Tensor) -> tuple[Tensor]:
    return (head(states),)


def _scaled_name(adapter: Any) -> tuple[str, float]:
    match adapter:
        case (str(name), float() | int() as scale) if math.isfinite(scale):
            return name, float(scale)
    raise AdapterError(
        "a row's adapter must be a name, (name, scale) with a finite scale, or None, "
        f"got {adapter!r}"
    )


def _filled(record: Record) -> Record:
    """Leave out adapters without routers; one entry for each router."""
    return {name: join_routing(routing) for name, routing in record.items() if routing}


def _cache_argument(model: nn.Module) -> str:
    """Name the argument for the key-value cache, which changed its name within transformers 5."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def _cache_of(output: Any) -> Any:
    """Return the key-value cache, whose field changed its name within transformers 5."""
    present = [name for name in ("cache", "past_key_values") if name in output.keys()]  # noqa: SIM118
    return output[present[0]] if present else None
