"""Forwards of a frozen base model whose rows have different adapters.

Axes: B batch, L sequence, N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from loraloom.adapters.base import SampleTokens
from loraloom.adapters.method import Adapter, AdapterConfig, Expert, check_config
from loraloom.adapters.own import tensor_shapes
from loraloom.errors import AdapterError, DataError, ModelError
from loraloom.formats.disk import find_adapter
from loraloom.formats.files import fit_to_base, read_stored, write_adapter
from loraloom.models.choice import Choice, batches_of, choose, output_of
from loraloom.models.combine import Combination, Merged, combine, prune
from loraloom.models.decoding import Decoding, make_cache
from loraloom.models.families import text_config
from loraloom.models.forward import ForwardContext, current_forward, running
from loraloom.models.layout import (
    RowAdapter,
    RowAdapters,
    SampleLengths,
    check_takes_packed_rows,
    make_layout,
    packed_rows,
)
from loraloom.models.registry import AdapterRegistry, Head
from loraloom.models.sharding import decoder_of, recovering
from loraloom.models.stacks import PreparedWeights, Record, StackedForward, forms_of, is_autocast_on
from loraloom.models.structure import FAMILIES, try_adapters
from loraloom.models.view import AdapterModel, OuterForward, Rows, Visit
from loraloom.ops.dropout import sample_key
from loraloom.ops.token_loss import token_losses, token_scores, trained_token_losses
from loraloom.ranks import Alone, Ranks
from loraloom.routing.record import LayerRouting, join_routing


def attach(model: nn.Module) -> Host:
    """Freeze a transformers causal LM and make it a host of adapters, in place until `detach()`.

    Raises:
        ModelError: If it is no model, its family is not supported, or it is attached already.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"attach takes a causal LM of transformers, got {type(model).__name__}; "
            "loraloom.load_base_model loads one by its name"
        )
    return Host(model)


@dataclass(frozen=True)
class HostOutput:
    """What a forward returns: logits, [B, L, V], and the cache and base model's loss if asked for.

    `routing` is each mixture's by adapter name, an entry for each router, real tokens only; those
    of rows with one scale before those with the next. In training, `samples` are those whose tokens
    these are.
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
    past_key_values: Any = None
    routing: dict[str, list[LayerRouting]] = field(default_factory=dict)
    samples: dict[str, list[SampleTokens] | None] = field(default_factory=dict)


class Host:
    """A base model that runs rows of different adapters in one batch.

    Forwards are in eval mode unless they say `training=True`. Several threads may use a host: one
    at a time is inside the base model, and none sees another's adapters or mode.

    Attributes:
        model: The base model, a transformers causal LM.
        base: Its description, as adapters' files have it.
        adapters: Those on it, by name.
        ranks: The processes that share its rows in training; this one alone by default.
        training: Whether forwards train by default.
        gradient_checkpointing: Whether forwards that train recompute decoder layers in the backward
            pass.
    """

    def __init__(self, model: nn.Module):
        self._registry = AdapterRegistry(model)
        self.model: Any = model
        self.base = self._registry.base
        self.adapters = self._registry.adapters
        self.ranks: Ranks = Alone()
        self._inside = threading.RLock()
        self._here = threading.local()
        self._decoder = decoder_of(model)
        self.outer_forward = OuterForward(self, model)
        for hook in self.outer_forward.hooks:
            self._registry.wiring.undo.callback(hook.remove)
        # The argument for the cache changed its name within transformers 5.
        names = signature(self.model.base_model.forward).parameters
        self._cache_argument = "cache" if "cache" in names else "past_key_values"
        self.training = False
        self.gradient_checkpointing = False
        self._forwards = 0
        if self.base.model_type not in FAMILIES:
            try:
                try_adapters(self)
            except BaseException:  # leaves a model as it was that adapters can't be added to
                self.detach()
                raise

    @property
    def config(self) -> Any:
        """The configuration of the base model's text part; most models are nothing else."""
        return text_config(self.model)

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The base model's dtype, in which low-rank products run."""
        return self.model.dtype

    def add(self, name: str, config: AdapterConfig, seed: int = 0) -> Adapter:
        """Put a new adapter on the base model, under a safe file name that is not taken.

        Raises:
            ConfigError: If the name is no safe file name, or the configuration not loraloom's.
            AdapterError: If it is taken, or target modules are not in the base model.
        """
        self._registry.check_unmerged("start an adapter")
        found = {own: self._source(place) for own, place in check_config(config).sources.items()}
        if found:
            config = config.with_experts({own: one for own, (one, _) in found.items()})
        else:
            config.check_begins()
        adapter = self._registry.build(name, config, seed)
        for own, (_, tensors) in found.items():
            adapter.part(own).load_tensors(tensors)
        adapter.begin()
        by_default = config.target_modules == "all-linear" and not adapter.part_names
        if by_default and not self.base.ffn_projections:
            warnings.warn(
                f"adapter {name!r} is on attention alone: the base model's FFN blocks are mixtures "
                "of experts, which stay as they are; target_modules: attention means the same",
                stacklevel=2,
            )
        return self._registry.register(adapter)

    def _source(self, place: str) -> tuple[Expert, Mapping[str, Tensor]]:
        """Read an adapter that another one is to be made of: one on the host, or from files."""
        whole, slash, _ = place.partition("/")
        if whole in self.adapters and (not slash or self.adapters[whole].part_names):
            held = self._registry.get(place)
            return Expert(adapter=held.config, prompt=held.prompt), held.tensors()
        stored = read_stored(find_adapter(place))
        config, tensors = fit_to_base(stored, self.base)
        return Expert(adapter=config, prompt=stored.prompt), tensors

    def add_experts(self, adapter: str, experts: Mapping[str, str], *, name: str) -> Adapter:
        """Make a new routed adapter of all experts of another one, which stays, and further ones.

        What was there is the same bit by bit. The new experts' routers begin as in a new adapter;
        `fit_router(..., only=[...])` teaches those of a router by prompt alone, and in training
        `lr_ratios` keeps the others' rows as they are.

        Args:
            adapter: The routed adapter's name.
            experts: The new ones by name: directories, hub ids, or names of adapters on the host.
            name: The new adapter's.
        """
        source = self._registry.get(adapter)
        extended = self.add(name, source.config.with_experts(experts))
        extended.load_tensors({**extended.tensors(), **source.tensors()})
        extended.prompt = source.prompt
        return extended

    def choose(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[RowAdapter]
    ) -> list[Choice]:
        """Tell what answers prompts, token ids each: of a routed adapter by prompt, its choice."""
        return choose(self, prompts, adapters)

    @torch.no_grad()
    def prompt_states(
        self, prompts: Sequence[Sequence[int]], num_layers: int
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Compute the base model's states of prompts behind so many layers; 0: the embeddings.

        Yields:
            For a batch the prompts' places, the states of their tokens, [T, D], and whose they are,
            [T], by the number in the batch.
        """
        module = self.model.get_input_embeddings()
        if num_layers:
            module = self.model.get_submodule(self.base.layers_path)[num_layers - 1]
        for places, ids, mask in batches_of(prompts, self.config.vocab_size):
            with self._inside, running(None), output_of(module) as found:
                inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
                self._decoder(**inputs, use_cache=False)
            owners, columns = (one.to(self.device) for one in mask.nonzero(as_tuple=True))
            yield places, found[0][owners, columns], owners

    def load(
        self, name: str, path_or_hub_id: str | Path, settings: Mapping[str, Any] | None = None
    ) -> Adapter:
        """Put an adapter from files on the base model.

        They are in PEFT's, MoE-PEFT's, axolotl's or loraloom's layout. `settings` are the method's,
        `{"top_k": 2}` for instance, that files lack or in place of what they have.

        Raises:
            FormatError: If the files can't be read.
            AdapterError: If they don't fit the base model, or the name is taken.
        """
        stored = read_stored(find_adapter(path_or_hub_id), settings)
        config, tensors = fit_to_base(stored, self.base)
        if tensor_shapes(config, self.base).keys() - tensors.keys():
            self._registry.check_unmerged("load what depends on its weights")
        adapter = self._registry.build(name, config)
        adapter.load_tensors(tensors)
        adapter.prompt = stored.prompt
        return self._registry.register(adapter)

    def save(
        self, name: str, directory: str | Path, card: str | None = None, *, overwrite: bool = False
    ) -> None:
        """Write an adapter's files in its method's layout, with `card` as README.md.

        An adapter that is there already is an error, or replaced with `overwrite`.
        """
        adapter = self._registry.get(name)
        described = (adapter.config, adapter.tensors(), self.base, card)
        write_adapter(directory, *described, prompt=adapter.prompt, overwrite=overwrite)

    def adapter(self, name: str) -> Adapter:
        """Return an adapter, or a sum; raise an AdapterError if there is none of that name."""
        return self._registry.find(name)

    def remove(self, name: str) -> None:
        """Take an adapter off and free it."""
        self._registry.remove(name)

    def combine(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        combination: Combination = "linear",
        *,
        name: str,
    ) -> Adapter:
        """Make a new adapter of several of one method, rank and set of projections.

        Updates are combined as PEFT's `add_weighted_adapter` does it, experts with the experts of
        their number. Routers and DoRA's magnitudes are averaged by the weights' shares.

        Args:
            adapters: Names of those that are combined; they stay.
            weights: A factor for each one's update, perhaps negative.
            combination: `linear` adds A and B up, `svd` the updates BA; `cat` puts LoRAs, whose
                ranks may differ, behind one another, which is their sum exactly.
            name: The new adapter's.
        """
        sources = [self._registry.get(source) for source in adapters]
        config, tensors = combine(sources, weights, combination)
        adapter = self._registry.build(name, config)
        adapter.load_tensors(tensors)
        prompts = [source.prompt for source in sources]
        adapter.prompt = prompts[0] if all(one == prompts[0] for one in prompts) else None
        return self._registry.register(adapter)

    def prune(self, adapter: str, experts: Sequence[int], *, name: str) -> Adapter:
        """Make a new adapter of some experts of a mixture, which stays.

        Args:
            adapter: The mixture's name.
            experts: Numbers of those that are kept, in the order that they get.
            name: The new adapter's.

        Raises:
            ConfigError: If there are no such experts, or fewer than its router chooses.
            AdapterError: If its layers have different numbers of experts, or none.
        """
        source = self._registry.get(adapter)
        config, tensors = prune(source, experts, self.base)
        pruned = self._registry.build(name, config)
        pruned.load_tensors(tensors)
        pruned.prompt = source.prompt
        return self._registry.register(pruned)

    @property
    def merged(self) -> str | None:
        """The adapter that is in the base model's weights; None for none."""
        return self._registry.merged and self._registry.merged.name

    def merge(self, name: str) -> float:
        """Put an adapter's updates into the base model's weights; return the share that is lost.

        Rounding to the base model's dtype loses it. Rows without an adapter are its own then, at
        the base model's speed. Other adapters add to the merged weights. The original weights are
        kept, on the CPU. Nothing trains, and decoding sessions that have begun must not go on.

        Raises:
            AdapterError: If it has routers, one is merged already, or the base's weights are
                quantised; the base model is as it was then.
        """
        adapter = self._registry.get(name)
        self._registry.check_unmerged("merge another")
        with self._inside:
            merged = self._registry.merged = Merged(adapter)
        return merged.lost

    def unmerge(self, name: str) -> None:
        """Put the base model's weights back as they were, bit by bit."""
        if name != self.merged:
            raise AdapterError(f"the adapter to unmerge must be {self.merged}, got {name!r}")
        with self._inside:
            self._registry.unmerge()

    def detach(self) -> nn.Module:
        """Take everything off and return the base model as it was before `attach`."""
        with self._inside:
            self._registry.detach()
        return self.model

    def train(self, mode: bool = True) -> Host:
        """Make training the default of forwards: dropout and jitter are on.

        Where the base model is in float16, the loss must be scaled (`torch.amp.GradScaler`).
        """
        if mode:
            self._registry.check_unmerged("train")
        self.training = mode
        return self

    def eval(self) -> Host:
        return self.train(False)

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Let forwards that train recompute each decoder layer in the backward pass."""
        self.gradient_checkpointing = enabled

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: RowAdapters = None,
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
        """
        rows = (input_ids, attention_mask, adapters, model_inputs, sample_keys)
        forward = self._forward(*rows, training=training, record={})
        mask = None if attention_mask is None else attention_mask.to(self.device)
        with self._run(forward):
            out = self.model(input_ids=input_ids, attention_mask=mask, **model_inputs)
        return HostOutput(out.logits, _cache_of(out), out.get("loss"), *_routing_of(forward))

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: RowAdapters = None,
        sample_keys: Sequence[int] | None = None,
        token_mask: Tensor | None = None,
        sample_lengths: SampleLengths | None = None,
        training: bool | None = None,
        **model_inputs: Any,
    ) -> HiddenOutput:
        """Run rows up to the final norm; other arguments are as in calling the host.

        Args:
            attention_mask: Padding mask, or a mask of your own to add to attention scores.
            sample_keys: A key for each sample's dropout, row after row.
            token_mask: 1 at real tokens, [B, L], where the attention mask doesn't say it.
            sample_lengths: Of rows that hold several samples from the left, the samples' tokens;
                they replace both masks and `position_ids`. None: a row is a sample.
        """
        real = attention_mask if token_mask is None else token_mask
        if sample_lengths is not None:
            check_takes_packed_rows(self.config)
            positions, real = packed_rows(sample_lengths, *input_ids.shape)
            # With a mask transformers would let samples see each other.
            attention_mask, model_inputs["position_ids"] = None, positions.to(self.device)
        model_inputs.setdefault("use_cache", False)
        rows = (input_ids, real, adapters, model_inputs, sample_keys, sample_lengths)
        forward = self._forward(*rows, training=training, record={})
        mask = None if attention_mask is None else attention_mask.to(self.device)
        with self._run(forward):
            out = self._decoder(input_ids=input_ids, attention_mask=mask, **model_inputs)
        return HiddenOutput(out.last_hidden_state, _cache_of(out), *_routing_of(forward))

    def auxiliary_loss(self, output: HostOutput | HiddenOutput) -> Tensor:
        """Add up what the adapters of a forward with `training=True` add to the objective.

        `loraloom train` adds the same to each job's loss: balance of the routers' load, their
        z-loss, entropy, or what else the methods have. A loop of your own must add it too.
        """
        loss = self._auxiliary_loss(output.routing, output.samples)
        return torch.zeros((), device=self.device) if loss is None else loss

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Keep compute forms of the weights over this thread's forwards without gradients.

        Inside, weights must not be changed; outside, every forward computes from the parameters.
        """
        if self._prepared_here() is not None:
            yield
            return
        self._here.prepared = PreparedWeights()
        try:
            yield
        finally:
            self._here.prepared = None

    def logits(self, hidden_states: Tensor, adapters: RowAdapters = None) -> Tensor:
        """Map final hidden states [N, …, D] to logits [N, …, V], scaled and soft-capped.

        `adapters` are those of each state, where some may have a head of their own.
        """
        return self._registry.logits(hidden_states, adapters, self._prepared_here())

    def token_losses(
        self, hidden_states: Tensor, labels: Tensor, adapters: RowAdapters = None
    ) -> Tensor:
        """Compute -log p of each label, [N], from the state that predicts it, [N, D], in chunks.

        Losses, [N] float32, are differentiable by the states and adapters' heads.
        """

        def compute(head: Head, states: Tensor, targets: Tensor) -> list[Tensor]:
            is_trained = head is not self._registry.head and torch.is_grad_enabled()  # an adapter's
            losses = trained_token_losses if is_trained else token_losses
            return [losses(states, targets, head, self.config.vocab_size)]

        tensors = [hidden_states, labels]
        return self._registry.by_heads(compute, tensors, adapters, self._prepared_here())[0]

    def token_scores(
        self, hidden_states: Tensor, labels: Tensor, adapters: RowAdapters = None, num_top: int = 0
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute log p of each label, [N], and whether it is the most likely token, [N].

        With them come log p of the `num_top` most likely tokens in its place, [N, K], and their
        ids, [N, K]. Arguments are those of `token_losses`.
        """
        vocab_size = self.config.vocab_size

        def compute(head: Head, states: Tensor, targets: Tensor) -> Sequence[Tensor]:
            return token_scores(states, targets, head, vocab_size, min(num_top, vocab_size))

        tensors = [hidden_states, labels]
        log_probs, is_top, top_log_probs, top_ids = self._registry.by_heads(
            compute, tensors, adapters, self._prepared_here()
        )
        return log_probs, is_top, top_log_probs, top_ids

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: RowAdapters = None,
        prepared: PreparedWeights | None = None,
        record: Record | None = None,
    ) -> Decoding:
        """Read prompts, padded on the left, and return a session with the next tokens' logits.

        Its rows may go (`keep`), and those of another session join it (`join`). Weights must not
        change while it goes on; `prepared` has their compute forms, by default the session's own.
        The mask is read on the CPU. `record` collects what routers do, by adapter name.
        """
        mask = torch.ones(input_ids.shape, dtype=torch.long)
        mask = mask if attention_mask is None else attention_mask.cpu()
        if not bool((mask.long().diff(dim=1) >= 0).all() and mask[:, -1].all()):
            raise DataError(
                "prompts must be padded on the left, so that all of them end at the last column; "
                "got an attention_mask with 0 behind 1"
            )
        names = self._chosen(input_ids, mask, adapters)
        cache = make_cache(self.config)
        session = Decoding(names, mask[:, :0], cache, prepared or PreparedWeights())
        self._advance(session, input_ids, mask, record)
        return session

    def decode(self, session: Decoding, tokens: Tensor, record: Record | None = None) -> Tensor:
        """Continue every row of a session by a token, [B]; return the next logits, [B, V]."""
        return self.extend(session, tokens.unsqueeze(1), record)

    def extend(self, session: Decoding, input_ids: Tensor, record: Record | None = None) -> Tensor:
        """Continue every row of a session by tokens, [B, L]; return the next logits, [B, V]."""
        ones = session.attention_mask.new_ones(input_ids.shape)
        self._advance(session, input_ids, ones, record)
        return session.logits

    @torch.no_grad()
    def _advance(
        self, session: Decoding, input_ids: Tensor, added: Tensor, record: Record | None
    ) -> None:
        """Run tokens of a session; its logits become those after the last one of each row."""
        mask = torch.cat([session.attention_mask, added], dim=1)
        positions = mask.cumsum(1).sub(1).clamp_min(0)[:, -input_ids.shape[1] :]
        names, prepared = session.adapters, session.prepared
        inputs = {"position_ids": positions.to(self.device), self._cache_argument: session.cache}
        options = {"training": False, "record": record, "prepared": prepared}
        forward = self._forward(input_ids, mask, names, inputs, **options)
        # One of ones is left out, as transformers would ask the device for it, and then do so.
        real = None if bool(mask.all()) else mask.to(self.device)
        with self._run(forward):
            out = self._decoder(input_ids=input_ids, attention_mask=real, use_cache=True, **inputs)
        session.attention_mask = mask
        states = out.last_hidden_state[:, -1].contiguous()
        session.logits = self._registry.logits(states, names, prepared)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        adapters: RowAdapters = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Generate with transformers' `generate` and its arguments, each row with its adapter.

        Prompts, [B, L], are padded on the left; beams and returned sequences take their row's
        adapter.
        """
        names = self._chosen(input_ids, attention_mask, adapters)
        rows = Rows([None] if adapters is None else names)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        with self.prepared(), self.outer_forward.of_rows(rows):
            return self.model.generate(**inputs, **generate_kwargs)

    def as_model(self, name: str | None) -> AdapterModel:
        """Show an adapter, or the base model, as a separate model, for trainers of others."""
        return AdapterModel(self, name)

    def _forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        adapters: RowAdapters,
        inputs: dict[str, Any],
        sample_keys: Sequence[int] | None = None,
        sample_lengths: SampleLengths | None = None,
        *,
        training: bool | None = None,
        record: Record | None = None,
        prepared: PreparedWeights | None = None,
    ) -> ForwardContext:
        """Open a forward's context; `inputs` are the base model's other ones, which it changes."""
        batch_size, length = input_ids.shape
        training = self.training if training is None else training
        checkpointing = training and self.gradient_checkpointing
        is_packed = sample_lengths is not None
        caches = [inputs.get(name) for name in ("cache", "past_key_values")]
        caches = [cache for cache in caches if cache is not None]
        if not training:
            begun = {"caches": caches, "is_packed": is_packed}
            adapters = self._chosen(input_ids, attention_mask, adapters, **begun)
        # With a cache, layers that are recomputed would fill it twice, and transformers would let
        # the samples of a packed row see each other.
        if checkpointing or is_packed:
            inputs.setdefault("use_cache", False)
            if inputs["use_cache"] or caches:
                raise ModelError(
                    "a forward of packed rows, or with gradient checkpointing, fills no cache: "
                    f"leave use_cache and {self._cache_argument} out, or call "
                    "enable_gradient_checkpointing(False)"
                )
        rows = self._registry.rows(adapters, batch_size)
        is_compiled = torch.compiler.is_compiling() or get_eval_frame_callback() is not None
        if torch.is_grad_enabled() and (is_compiled or self.model._compiled_call_impl is not None):
            raise ModelError(
                "forwards with gradients must not be compiled, as torch.compile doesn't see that "
                "updates are written to the base's outputs; leave it (torch_compile of Trainer) out"
            )
        keys = None
        if training:
            self._registry.check_unmerged("train")
            for row in rows:
                if row is not None:
                    row[0].check_is_trained()
            self._forwards += 1
            count = sum(map(len, sample_lengths)) if sample_lengths is not None else batch_size
            drawn = (sample_key(0, self._forwards, place) for place in range(count))
            keys = [*map(int, drawn if sample_keys is None else sample_keys)]
            if len(keys) != count:
                what = "samples" if is_packed else "rows"
                raise AdapterError(
                    f"sample_keys must have one key for each of the {count} {what}, got {len(keys)}"
                )
        layout = make_layout(rows, length, attention_mask, keys, self.device, sample_lengths)
        prepared = self._prepared_here() if prepared is None else prepared
        has_padding = any(segment.real is not None for segment in layout.segments)
        is_plain = not (training or torch.is_grad_enabled() or has_padding)
        plan = None
        if prepared is not None and is_plain and any(rows):
            place = self.device.type
            dtype = torch.get_autocast_dtype(place) if is_autocast_on(place) else self.dtype
            plan = prepared.plan(rows, length, dtype, self.device)
        return ForwardContext(
            self._registry.wiring,
            layout,
            checkpointing=checkpointing,
            record=record,
            forms=forms_of(prepared),
            stacked=None if plan is None else StackedForward(plan, record),
        )

    def _chosen(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        adapters: RowAdapters,
        *,
        caches: Sequence[Any] = (),
        is_packed: bool = False,
    ) -> list[RowAdapter]:
        """Name rows' adapters; those that are chosen by prompt, by the row's tokens here."""
        rows = self._registry.rows(adapters, len(input_ids))  # a text is no list of names
        names: list[RowAdapter] = [*(adapters or [None] * len(rows))]
        if all(row is None or row[0].chooser is None for row in rows):
            return names
        real = torch.ones(input_ids.shape) if mask is None else mask.cpu()
        is_part = is_packed or any(cache.get_seq_length() for cache in caches)
        if is_part or input_ids.is_floating_point() or real.shape != input_ids.shape:
            raise AdapterError(
                "an adapter that is chosen by prompt needs a row's tokens in one forward, without "
                "a cache; ask host.choose first and give what it chose, or call host.generate"
            )
        prompts = [row[own.bool()].tolist() for row, own in zip(input_ids.cpu(), real, strict=True)]
        return [one.adapter for one in choose(self, prompts, names)]

    @contextmanager
    def _run(self, forward: ForwardContext) -> Iterator[None]:
        with self._inside, running(forward), recovering(self.model):
            yield

    @property
    def is_running(self) -> bool:
        """Whether a forward of this host runs in this thread."""
        return current_forward(self._registry.wiring) is not None

    def visit(
        self, tokens: Tensor, mask: Tensor | None, rows: Rows, inputs: dict[str, Any]
    ) -> Visit:
        """Open the context of a forward that others make; `inputs` are its arguments by name."""
        keys, record = None, None
        if rows.training:
            # Nobody can tell whether the trainer scales its loss.
            if self.dtype == torch.float16:
                raise ModelError(
                    "training by other programs needs a base model in bfloat16 or float32, got "
                    "float16: without loss scaling small gradients become zero; load it in another "
                    "dtype, or train with loraloom, which scales losses"
                )
            # Who saves and restores the state of torch's generator goes on with these numbers.
            keys, record = torch.randint(2**62, (len(tokens),)).tolist(), {}
        names = rows.adapters
        if len(names) == 1 or self._prepared_here() is not None:  # within `generate`, beams
            names = rows.expanded(len(tokens))
        # As transformers does it.
        if rows.training and self.gradient_checkpointing:
            inputs["use_cache"] = False
        options = {"training": rows.training, "record": record}
        forward = self._forward(tokens, mask, names, inputs, keys, **options)
        return self._run(forward), lambda: self._auxiliary_loss(*_routing_of(forward))

    def _auxiliary_loss(
        self,
        routing: Mapping[str, list[LayerRouting]],
        samples: Mapping[str, list[SampleTokens] | None],
    ) -> Tensor | None:
        """Add up what adapters add to the objective; None for nothing."""
        losses = [
            self.adapter(name).config.auxiliary_loss(records, samples.get(name))
            for name, records in routing.items()
        ]
        present = [loss for loss in losses if loss is not None]
        return torch.stack(present).sum() if present else None

    def _prepared_here(self) -> PreparedWeights | None:
        """Return what a `with host.prepared():` of this thread keeps."""
        return getattr(self._here, "prepared", None)


def _routing_of(
    forward: ForwardContext,
) -> tuple[dict[str, list[LayerRouting]], dict[str, list[SampleTokens] | None]]:
    """Return what routers did, an entry for each, and whose tokens these are."""
    record = {name: routing for name, routing in (forward.record or {}).items() if routing}
    routing = {name: join_routing(entries) for name, entries in record.items()}
    return routing, {name: forward.layout.sample_tokens(name) for name in record}


def _cache_of(output: Any) -> Any:
    """Return the key-value cache, whose field changed its name within transformers 5."""
    present = [name for name in ("cache", "past_key_values") if name in output.keys()]  # noqa: SIM118
    return output[present[0]] if present else None
