"""Forwards of a frozen base model whose rows have different adapters.

Axes: B batch, L sequence, N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.base import SampleTokens
from loraloom.errors import AdapterError, DataError, ModelError
from loraloom.models.autocast import compute_dtype
from loraloom.models.decoding import Decoding, make_cache
from loraloom.models.door import Door, Rows, Visit, expand_adapters, nobody
from loraloom.models.forward import (
    ForwardContext,
    PreparedWeights,
    Record,
    current_forward,
    query_mask,
    running,
    segment_adapters,
)
from loraloom.models.head_outputs import HeadOutputs
from loraloom.models.layout import (
    Layout,
    RowAdapter,
    SampleLengths,
    check_takes_packed_rows,
    make_layout,
    packed_positions,
    packed_token_mask,
)
from loraloom.models.sharding import decoder_of, recovering
from loraloom.models.stacking import StackedForward
from loraloom.models.structure import try_adapters
from loraloom.models.view import AdapterModel
from loraloom.ops.dropout import sample_key
from loraloom.ranks import Alone, Ranks
from loraloom.routing.record import LayerRouting, join_routing


@dataclass(frozen=True)
class HostOutput:
    """What a forward returns.

    Args:
        logits: [B, L, V] (fewer positions with `logits_to_keep`).
        past_key_values: The cache, if one was asked for.
        loss: The base model's own loss, if labels were given.
        routing: Each mixture's routing by adapter name, an entry for each router, real tokens only;
            those of rows with one scale before those with the next.
        samples: In training the samples whose tokens these are, by adapter name.
    """

    logits: Tensor
    past_key_values: Any = None
    loss: Tensor | None = None
    routing: dict[str, list[LayerRouting]] = field(default_factory=dict)
    samples: dict[str, list[SampleTokens] | None] = field(default_factory=dict)


@dataclass(frozen=True)
class HiddenOutput:
    """Hidden states after the final norm, [B, L, D], and the rest as in HostOutput."""

    last_hidden_state: Tensor
    routing: dict[str, list[LayerRouting]]
    past_key_values: Any = None
    samples: dict[str, list[SampleTokens] | None] = field(default_factory=dict)


class Host(HeadOutputs):
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
        super().__init__(model)
        self.ranks: Ranks = Alone()
        self._decoder = decoder_of(model)
        self._generation = self.door(model)
        self._cache_argument = _cache_argument(self.model.base_model)
        self._training = False
        self._checkpointing = False
        self._forwards = 0
        if not self._family.in_table:
            self._try()

    @property
    def training(self) -> bool:
        """Whether forwards train by default."""
        return self._training

    def train(self, mode: bool = True) -> Host:
        """Make training the default of forwards: dropout and jitter are on.

        Where the base model is in float16, the loss must be scaled (`torch.amp.GradScaler`).

        Raises:
            AdapterError: If an adapter is merged.
        """
        if mode:
            self._check_unmerged("train")
        self._training = mode
        return self

    def eval(self) -> Host:
        """Make eval mode the default of forwards."""
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
            sample_keys: A key for each row's dropout in training (`ops.dropout.sample_key`); drawn
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
        samples = _samples(record, forward.layout)
        return HostOutput(out.logits, _cache_of(out), out.get("loss"), _filled(record), samples)

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
        samples = _samples(record, forward.layout)
        return HiddenOutput(out.last_hidden_state, _filled(record), _cache_of(out), samples)

    def auxiliary_loss(self, output: HostOutput | HiddenOutput) -> Tensor:
        """Add up what the adapters of a forward add to the objective, with their coefficients.

        `loraloom train` adds the same to each job's loss: balance of the routers' load, their
        z-loss, entropy, or what else the methods have. A loop of your own must add it too.

        Args:
            output: Of a forward with `training=True`.

        Returns:
            A scalar, which is 0 where no adapter adds anything.
        """
        loss = self._auxiliary_loss(output.routing, output.samples)
        return torch.zeros((), device=self.device) if loss is None else loss

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
            A session with the logits of each row's next token. Its rows may go (`keep`), and those
            of another session join it (`join`). Weights must not change while it goes on.

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
        session.logits = self._logits(states, session.adapters, session.prepared)

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
        known = weakref.ref(door)  # the module's hooks keep it, and it keeps the adapter
        self._wiring.on_undo(lambda: (door := known()) and door.undo())
        return door

    def as_model(self, name: str | None) -> AdapterModel:
        """Show an adapter, or the base model, as a model of its own, for trainers of others.

        Raises:
            AdapterError: If there is no such adapter.
        """
        return AdapterModel(self, name)

    def _try(self) -> None:
        """Leave a model as it was that adapters can't be added to."""
        try:
            try_adapters(self)
        except BaseException:
            self.detach()
            raise
        self._forwards = 0

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
        keys = None
        if rows.training:  # who saves and restores the state of torch's generator goes on with them
            keys = torch.randint(2**62, (len(tokens),)).tolist()
        forward = self._forward(
            tokens,
            attention_mask,
            expand_adapters(rows.adapters, len(tokens)),
            keys,
            training=rows.training,
            record=record if rows.training else None,
        )
        return Visit(
            self._run(forward),
            lambda: self._auxiliary_loss(_filled(record), _samples(record, forward.layout)),
            self._without_cache if forward.checkpointing else dict,
        )

    def _auxiliary_loss(
        self,
        routing: Mapping[str, list[LayerRouting]],
        samples: Mapping[str, list[SampleTokens] | None],
    ) -> Tensor | None:
        """Add up what adapters add to the objective; None for nothing."""
        losses = [
            self.adapters[name].auxiliary_loss(records, samples.get(name))
            for name, records in routing.items()
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

    def _without_cache(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        """Let a forward that others make keep no cache, as transformers does it."""
        inputs = {**model_inputs, "use_cache": False}
        self._check_fills_no_cache(inputs)
        return inputs

    def _check_fills_no_cache(self, model_inputs: Mapping[str, Any]) -> None:
        """Refuse a cache that a recomputed layer would fill a second time."""
        caches = (model_inputs.get(name) for name in ("cache", "past_key_values"))
        if model_inputs["use_cache"] or any(cache is not None for cache in caches):
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


def _filled(record: Record) -> Record:
    """Leave out adapters without routers; one entry for each router."""
    return {name: join_routing(routing) for name, routing in record.items() if routing}


def _samples(record: Record, layout: Layout) -> dict[str, list[SampleTokens] | None]:
    return {name: layout.sample_tokens(name) for name, routing in record.items() if routing}


def _cache_argument(model: nn.Module) -> str:
    """Name the argument for the key-value cache, which changed its name within transformers 5."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def _cache_of(output: Any) -> Any:
    """Return the key-value cache, whose field changed its name within transformers 5."""
    present = [name for name in ("cache", "past_key_values") if name in output.keys()]  # noqa: SIM118
    return output[present[0]] if present else None
