"""Forwards of a frozen base model whose rows have different adapters.

Axes: B batch, L sequence, N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from loraloom.adapters.combining import Combination, combine, prune
from loraloom.adapters.contract import Adapter, AdapterConfig, check_config
from loraloom.adapters.extra_modules import tensor_shapes
from loraloom.adapters.routed.choice import Choice
from loraloom.adapters.routed.method import add_experts, build_from_sources, prompt_router_of
from loraloom.adapters.segment import Records, Samples, SampleTokens
from loraloom.adapters.weighted_sum import is_sum, parse_sum, write_sum
from loraloom.base.families import FAMILIES
from loraloom.base.sharding import decoder_of, recovering
from loraloom.base.structure import Head, text_config
from loraloom.config.data import PromptForm
from loraloom.distributed import Alone, Ranks
from loraloom.errors import AdapterError, DataError, ModelError, names_in
from loraloom.formats.files import fit_to_base, read_stored, write_adapter
from loraloom.formats.layouts import StoredAdapter
from loraloom.formats.raw_files import find_adapter
from loraloom.host.choice import batches_of, choose, output_of, padding_mask
from loraloom.host.decoding import Decoding, make_cache
from loraloom.host.forward import ForwardContext, current_forward, running
from loraloom.host.layout import (
    RowAdapter,
    RowAdapters,
    SampleLengths,
    check_uses_masks,
    make_layout,
    packed_rows,
)
from loraloom.host.outer_forward import AdapterModel, OuterForward, Rows
from loraloom.host.prepared_weights import (
    PreparedWeights,
    Record,
    StackedForward,
    forms_of,
    is_autocast_on,
)
from loraloom.host.registry import AdapterRegistry, describe
from loraloom.host.trial import try_adapters, try_packing
from loraloom.ops.dropout import sample_key
from loraloom.ops.token_loss import token_losses, token_scores, trained_token_losses
from loraloom.routing.record import LayerRouting, join_routing


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


@dataclass(frozen=True)
class HostOutput:
    """The result of a forward: logits, [B, L, V], and if requested the cache and the loss.

    `routing` lists, for each mixture by name, the decisions of each router for real tokens, sorted
    by the scales of the rows. In training, `samples` names the sample of each of these tokens.
    """

    logits: Tensor
    past_key_values: Any = None
    loss: Tensor | None = None
    routing: dict[str, list[LayerRouting]] = field(default_factory=dict)
    samples: dict[str, list[SampleTokens] | None] = field(default_factory=dict)


@dataclass(frozen=True)
class HiddenOutput:
    """The result of `Host.hidden`: states after the final norm, [B, L, D], else as HostOutput."""

    last_hidden_state: Tensor
    past_key_values: Any = None
    routing: dict[str, list[LayerRouting]] = field(default_factory=dict)
    samples: dict[str, list[SampleTokens] | None] = field(default_factory=dict)


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
        self._registry = AdapterRegistry(model)
        self.model: Any = model
        self.base = self._registry.base
        self.ranks: Ranks = Alone()
        self.default_form: PromptForm | None = None  # of rows whose adapter has none
        self._inside = threading.RLock()
        self._here = threading.local()
        undo = self._registry.wiring.undo
        self._decoder = decoder_of(model, undo)
        self.outer_forward = OuterForward(self, model)
        undo.callback(vars(model).pop, "_call_impl")
        # The argument for the cache changed its name within transformers 5.
        names = signature(self.model.base_model.forward).parameters
        self._cache_argument = "cache" if "cache" in names else "past_key_values"
        self.gradient_checkpointing = False
        self._forwards = 0
        self._packs_with: set[str] = set()  # implementations of attention
        # For each cache, whose adapters are chosen by prompt, and which were.
        self._choices = WeakKeyDictionary[Any, tuple[list[RowAdapter], list[RowAdapter]]]()
        if self.base.model_type not in FAMILIES:
            try:
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
        return getattr(self._here, "training", False)

    @property
    def config(self) -> Any:
        """The configuration of the base model, or of its text part if it has others."""
        return text_config(self.model)

    @property
    def max_positions(self) -> int:
        """The length to which rows are decoded: of LongRoPE, beyond which earlier keys change."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            return rope["original_max_position_embeddings"]
        return self.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

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
        with self._registry.changing:  # another thread must not merge meanwhile
            return self._add(name, config, seed)

    def _add(self, name: str, config: AdapterConfig, seed: int) -> Adapter:
        self._registry.check_unmerged("start an adapter")

        def build(config: AdapterConfig) -> Adapter:
            return self._registry.build(name, config, seed)

        adapter = build_from_sources(check_config(config), self._source, build)
        by_default = config.target_modules == "all-linear" and not adapter.members
        num_without_ffn = sum(
            all(block.gating is None for block in layer.blocks) for layer in self._registry.layers
        )
        if by_default and num_without_ffn:
            layers = (
                "" if num_without_ffn == self.base.num_layers else f" in {num_without_ffn} layers"
            )
            warnings.warn(
                f"adapter {name!r} adapts attention only{layers}, because the base model's FFN "
                "blocks there are mixtures of experts; work continues. Set target_modules: "
                "attention instead.",
                stacklevel=3,
            )
        return self._registry.register(adapter)

    def _source(self, place: str) -> tuple[AdapterConfig, PromptForm | None, Mapping[str, Tensor]]:
        """Read an adapter that another one is to be made of: one on the host, or from files."""
        whole, slash, _ = place.partition("/")
        if whole in self.adapters and (not slash or self.adapters[whole].members):
            held = self._registry.get(place)
            return held.config, held.prompt, held.tensors()
        stored = read_stored(find_adapter(place))
        config, tensors = fit_to_base(stored, self.base)
        return config, stored.prompt, tensors

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

    @torch.no_grad()
    def prompt_states(
        self, prompts: Sequence[Sequence[int]], num_layers: int
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Compute the base model's hidden states of prompts after N layers; 0: the embeddings.

        Yields:
            For each batch, the indices of its prompts, the states of their tokens, [T, D], and the
            number in the batch of each token's prompt, [T].
        """
        module = self.model.get_input_embeddings()
        if num_layers:
            module = self.model.get_submodule(self.base.layers_path)[num_layers - 1]
        for places, ids, mask in batches_of(prompts, self.config.vocab_size):
            with self._inside, running(None), output_of(module) as found, recovering(self.model):
                inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
                self._decoder(**inputs, use_cache=False)
            owners, columns = (one.to(self.device) for one in mask.nonzero(as_tuple=True))
            yield places, found[0][owners, columns], owners

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
        stored = read_stored(find_adapter(path_or_hub_id), settings)
        config, tensors = fit_to_base(stored, self.base)
        return self._load(name, config, tensors, stored.prompt)

    def load_stored(self, name: str, stored: StoredAdapter) -> Adapter:
        """Load an adapter from files that were read; errors as in `load`."""
        config, tensors = fit_to_base(stored, self.base)
        return self._load(name, config, tensors, stored.prompt)

    def _load(
        self, name: str, config: AdapterConfig, tensors: Mapping[str, Tensor], prompt: Any
    ) -> Adapter:
        with self._registry.changing:
            if tensor_shapes(config, self.base).keys() - tensors.keys():
                self._registry.check_unmerged("load what depends on its weights")
            return self._register(name, config, tensors, prompt)

    def _register(
        self, name: str, config: AdapterConfig, tensors: Mapping[str, Tensor], prompt: Any
    ) -> Adapter:
        adapter = self._registry.build(name, config)
        adapter.load_tensors(tensors)
        adapter.prompt = prompt
        return self._registry.register(adapter)

    def save(
        self, name: str, directory: str | Path, card: str | None = None, *, overwrite: bool = False
    ) -> None:
        """Write an adapter's files in the layout of its method, with `card` as README.md.

        If `directory` contains an adapter, pass `overwrite=True` to replace it.
        """
        adapter = self._registry.get(name)
        described = (adapter.config, adapter.tensors(), self.base, card)
        write_adapter(directory, *described, prompt=adapter.prompt, overwrite=overwrite)

    def adapter(self, name: str) -> Adapter:
        """Return an adapter or a sum by name, or raise an AdapterError."""
        return self._registry.find(name)

    def remove(self, name: str) -> None:
        """Remove an adapter and free its memory."""
        self._registry.remove(name)

    def combine(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        combination: Combination = "linear",
        *,
        name: str,
    ) -> Adapter:
        """Make a new adapter from several of the same method, rank and target modules.

        Updates are combined as in PEFT's `add_weighted_adapter`, experts with the experts of the
        same number. Routers and DoRA's magnitudes are averaged by the shares of the weights.

        Args:
            adapters: Names of the adapters to combine, which stay.
            weights: Factors for the update of each adapter; they may be negative.
            combination: `linear` adds up A and B, `svd` the updates BA; `cat` concatenates LoRAs,
                whose ranks may differ, which is their exact sum.
            name: Name of the new adapter.
        """
        sources = [self._registry.get(source) for source in adapters]
        config, tensors = combine(sources, weights, combination)
        prompts = [source.prompt for source in sources]
        is_same = all(one == prompts[0] for one in prompts)
        return self._register(name, config, tensors, prompts[0] if is_same else None)

    def prune(self, adapter: str, experts: Sequence[int], *, name: str) -> Adapter:
        """Make a new mixture from some experts of an existing one.

        Call `fit_router` again if a routed adapter's experts only now share a prompt form.

        Args:
            adapter: Name of the existing mixture, which stays.
            experts: Numbers of the experts to keep, in their new order.
            name: Name of the new adapter.

        Raises:
            ConfigError: If an expert does not exist, or fewer remain than a router chooses.
            AdapterError: If the layers have different numbers of experts, or none.
        """
        source = self._registry.get(adapter)
        config, tensors = prune(source, experts, self.base)
        pruned = self._register(name, config, tensors, source.prompt)
        if source.forms_differ and not pruned.forms_differ:
            pruned.prompt = pruned.parts[1].prompt
        return pruned

    @property
    def merged(self) -> str | None:
        """The name of the adapter that is merged into the base model, or None."""
        merged = self._registry.hosted.merged
        return None if merged is None else merged.name

    def merge(self, name: str) -> float:
        """Merge an adapter into the base model; return the share of the update lost to rounding.

        Rows without an adapter then use the merged one, at the speed of the base model, and other
        adapters add to it. The original weights stay on the CPU. Until `unmerge`, nothing trains,
        and earlier decoding sessions must not continue.

        Raises:
            AdapterError: If the adapter has routers, another is merged, or the base model is
                quantized. The base model is unchanged then.
        """
        with self._registry.changing, self._inside:
            adapter = self._registry.find(name)
            self._registry.check_unmerged("merge another")
            return self._registry.merge(adapter).lost

    def unmerge(self, name: str) -> None:
        """Restore the base model's original weights exactly."""
        written = write_sum(parse_sum(name)) if is_sum(name) else name
        with self._registry.changing, self._inside:
            if written != self.merged:
                raise AdapterError(f"the adapter to unmerge must be {self.merged}, got {name!r}")
            self._registry.unmerge()

    def detach(self) -> nn.Module:
        """Remove all adapters and return the base model as it was before `attach`."""
        with self._registry.changing, self._inside:
            self._registry.detach()
        return self.model

    def train(self, mode: bool = True) -> Host:
        """Make this thread's forwards train by default, with dropout and jitter.

        If the base model is in float16, scale the loss (`torch.amp.GradScaler`).
        """
        if mode:
            self._registry.check_unmerged("train")
        self._here.training = mode
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
        **model_inputs: Any,
    ) -> HostOutput:
        """Run rows of several adapters.

        Args:
            input_ids: Tokens, [B, L].
            attention_mask: 1 at real tokens, [B, L], or [B, past + L] with a cache; None: all are.
                On an accelerator, a mask on the CPU avoids waiting for the device.
            adapters: For each row an adapter's name, `(name, scale)` to scale what it adds to the
                base model, or None for the base model. Default: the base model for all rows.
            sample_keys: Integers that determine each row's dropout in training; by default they
                follow from the number of forwards so far.
            training: Whether this forward uses dropout and jitter.
            **model_inputs: Further inputs of the base model: `past_key_values`, `position_ids`, …
        """
        rows = (input_ids, attention_mask, adapters, model_inputs, sample_keys)
        mask = None if attention_mask is None else attention_mask.to(self.device)
        with self._run(*rows, training=training, record={}) as forward:
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
        """Run rows up to the final norm; other arguments are those of a call of the host.

        Args:
            attention_mask: Padding mask, or a mask to add to attention scores.
            sample_keys: Integers that determine each sample's dropout, row after row.
            token_mask: 1 at real tokens, [B, L], if the attention mask is no padding mask.
            sample_lengths: Tokens of each sample in rows that contain several from the left; they
                replace both masks and `position_ids`. None: a row is a sample.
        """
        real = attention_mask if token_mask is None else token_mask
        if sample_lengths is not None:
            self.check_packing()
            positions, real = packed_rows(sample_lengths, *input_ids.shape)
            # With a mask transformers would let samples see each other.
            attention_mask, model_inputs["position_ids"] = None, positions.to(self.device)
        model_inputs.setdefault("use_cache", False)
        rows = (input_ids, real, adapters, model_inputs, sample_keys, sample_lengths)
        mask = None if attention_mask is None else attention_mask.to(self.device)
        with self._run(*rows, training=training, record={}) as forward:
            out = self._decoder(input_ids=input_ids, attention_mask=mask, **model_inputs)
        return HiddenOutput(out.last_hidden_state, _cache_of(out), *_routing_of(forward))

    def check_packing(self) -> None:
        """Raise a ModelError if samples of a packed row would see each other; tried once."""
        check_uses_masks(self.config)
        implementation = self.config._attn_implementation
        if implementation in self._packs_with:
            return
        with self._inside, running(None), recovering(self.model):
            try_packing(self, self._decoder)
        self._packs_with.add(implementation)

    def auxiliary_loss(self, output: HostOutput | HiddenOutput) -> Tensor:
        """Sum the auxiliary losses of the adapters in a forward with `training=True`.

        They are the routers' load-balance loss, z-loss or entropy, with their coefficients, and
        what else methods define. Add the sum to your loss, as `loraloom train` does.
        """
        loss = self._auxiliary_loss(output.routing, output.samples)
        return torch.zeros((), device=self.device) if loss is None else loss

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Keep prepared weights over several forwards of this thread without gradients.

        Do not change weights inside the context.
        """
        outer = self._prepared_here()
        self._here.prepared = outer or PreparedWeights()
        try:
            yield
        finally:
            self._here.prepared = outer

    def logits(self, hidden_states: Tensor, adapters: RowAdapters = None) -> Tensor:
        """Map final hidden states [N, …, D] to logits [N, …, V], scaled and soft-capped.

        `adapters` names the adapter of each state, because adapters may have separate heads.
        """
        return self._registry.logits(hidden_states, adapters, self._prepared_here())

    def token_losses(
        self, hidden_states: Tensor, labels: Tensor, adapters: RowAdapters = None
    ) -> Tensor:
        """Compute -log p of each label, [N], from the state that predicts it, [N, D], in chunks.

        The losses, [N] in float32, have gradients for the states and the adapters' heads.
        """

        def compute(head: Head, states: Tensor, targets: Tensor) -> list[Tensor]:
            is_trained = head is not self._registry.head and torch.is_grad_enabled()  # an adapter's
            losses = trained_token_losses if is_trained else token_losses
            return [losses(states, targets, head, self.config.vocab_size)]

        tensors = [hidden_states, labels]
        return self._registry.by_heads(compute, tensors, adapters, self._prepared_here())[0]

    def token_scores(
        self, hidden_states: Tensor, labels: Tensor, adapters: RowAdapters = None, num_top: int = 0
    ) -> Sequence[Tensor]:
        """Compute log p of each label, [N], and whether it is the most likely token, [N].

        With them come log p of the `num_top` most likely tokens in its place, [N, K], and their
        ids, [N, K]. Arguments are those of `token_losses`.
        """
        vocab_size = self.config.vocab_size

        def compute(head: Head, states: Tensor, targets: Tensor) -> Sequence[Tensor]:
            return token_scores(states, targets, head, vocab_size, min(num_top, vocab_size))

        tensors = [hidden_states, labels]
        return self._registry.by_heads(compute, tensors, adapters, self._prepared_here())

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
        """Append a token to each row of a session, [B]; return the next logits, [B, V]."""
        return self.extend(session, tokens.unsqueeze(1), record)

    def extend(self, session: Decoding, input_ids: Tensor, record: Record | None = None) -> Tensor:
        """Append tokens to each row of a session, [B, L]; return the next logits, [B, V]."""
        self._advance(session, input_ids, session.attention_mask.new_ones(input_ids.shape), record)
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
        # One of ones is left out, as transformers would ask the device for it, and then do so.
        real = None if bool(mask.all()) else mask.to(self.device)
        with self._run(input_ids, mask, names, inputs, **options):
            out = self._decoder(input_ids=input_ids, attention_mask=real, use_cache=True, **inputs)
        session.attention_mask, session.hidden_states = mask, out.last_hidden_state
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
        """Call transformers' `generate` with its arguments, each row with its adapter.

        Pad prompts, [B, L], on the left. Beams and returned sequences use the adapter of their
        row.
        """
        read = attention_mask
        if read is None:
            read = padding_mask(input_ids, self.model.generation_config, generate_kwargs)
        names = self._chosen(input_ids, read, adapters)
        rows = Rows([None] if adapters is None else names)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        with self.prepared(), self.outer_forward.of_rows(rows):
            return self.model.generate(**inputs, **generate_kwargs)

    def as_model(self, name: str | None) -> AdapterModel:
        """Return an adapter, or the base model, as a separate model for Trainer and trl."""
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
        self._registry.check_attached()
        batch_size, length = input_ids.shape
        training = self.training if training is None else training
        checkpointing = training and self.gradient_checkpointing
        is_packed = sample_lengths is not None
        caches = [inputs.get(name) for name in ("cache", "past_key_values")]
        caches = [cache for cache in caches if cache is not None]
        if not training:
            begun = {"caches": caches, "is_packed": is_packed, "labels": inputs.get("labels")}
            adapters = self._chosen(input_ids, attention_mask, adapters, **begun)
        # With a cache, layers that are recomputed would fill it twice, and transformers would let
        # the samples of a packed row see each other.
        if checkpointing or is_packed:
            inputs.setdefault("use_cache", False)
            if inputs["use_cache"] or caches:
                raise ModelError(
                    "a forward of packed rows, or with gradient checkpointing, does not support a "
                    f"cache; remove use_cache and {self._cache_argument}, or call "
                    "enable_gradient_checkpointing(False)"
                )
        rows = self._registry.rows(adapters, batch_size)
        is_compiled = torch.compiler.is_compiling() or get_eval_frame_callback() is not None
        if torch.is_grad_enabled() and (is_compiled or self.model._compiled_call_impl is not None):
            raise ModelError(
                "forwards with gradients must not be compiled, because torch.compile ignores "
                "updates of the base's outputs; remove torch.compile (torch_compile of Trainer)"
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
        # a quantized layer's outputs have its inputs' dtype, whatever autocast's is
        is_plain = is_plain and not (self.base.quantization and is_autocast_on(self.device.type))
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
        labels: Tensor | None = None,
    ) -> list[RowAdapter]:
        """Name rows' adapters; those that are chosen by prompt, by the row's tokens here."""
        rows = self._registry.rows(adapters, len(input_ids))  # a text is no list of names
        names: list[RowAdapter] = [*(adapters or [None] * len(rows))]
        if all(row is None or prompt_router_of(row[0]) is None for row in rows):
            return names
        real = torch.ones(input_ids.shape) if mask is None else mask.cpu()
        is_part = is_packed or any(cache.get_seq_length() for cache in caches)
        before = self._choices.get(caches[0]) if is_part and caches else None
        if before and before[0] == names:
            return before[1]
        if is_part or input_ids.is_floating_point() or real.shape != input_ids.shape:
            raise AdapterError(
                "an adapter that is chosen by prompt needs a row's tokens in one forward, without "
                "a cache; call host.choose first and pass its choice, or call host.generate"
            )
        if labels is not None:  # a prompt is what precedes them, and a text without one all of it
            asked = real.bool() & ((labels.cpu() != -100).cumsum(1) == 0)
            real = torch.where(asked.sum(1, keepdim=True) > 1, asked, real)
        prompts = [row[own.bool()].tolist() for row, own in zip(input_ids.cpu(), real, strict=True)]
        chosen: list[RowAdapter] = [one.adapter for one in choose(self, prompts, names)]
        self._choices.update(dict.fromkeys(caches, (names, chosen)))
        return chosen

    @contextmanager
    def _run(self, *rows: Any, **options: Any) -> Iterator[ForwardContext]:
        """Run a forward; within the lock nobody merges an adapter that its rows have."""
        with self._inside:
            forward = self._forward(*rows, **options)
            with running(forward), recovering(self.model):
                yield forward

    @property
    def is_running(self) -> bool:
        """Whether a forward of this host runs in this thread."""
        return current_forward(self._registry.wiring) is not None

    @contextmanager
    def visit(
        self, tokens: Tensor, mask: Tensor | None, rows: Rows, inputs: dict[str, Any]
    ) -> Iterator[Callable[[], Tensor | None]]:
        """Run a forward that another program makes with `inputs`, by name, which this may change.

        Yields:
            A function that returns the auxiliary loss when the forward is over.
        """
        keys, record = None, None
        if rows.training:
            # Nobody can tell whether the trainer scales its loss.
            if self.dtype == torch.float16:
                raise ModelError(
                    "training by other programs needs a base model in bfloat16 or float32, got "
                    "float16: without loss scaling small gradients become zero; load the model in "
                    "another dtype, or train with loraloom, which scales losses"
                )
            # Who saves and restores the state of torch's generator goes on with these numbers.
            keys, record = torch.randint(2**62, (len(tokens),)).tolist(), {}
        names = rows.adapters
        if len(names) == 1 or self._prepared_here() is not None:  # within `generate`, beams
            names = [name for name in names for _ in range(len(tokens) // len(names))]
        # As transformers does it.
        if rows.training and self.gradient_checkpointing:
            inputs["use_cache"] = False
        options = {"training": rows.training, "record": record}
        with self._run(tokens, mask, names, inputs, keys, **options) as forward:
            yield lambda: self._auxiliary_loss(*_routing_of(forward))

    def _auxiliary_loss(
        self, routing: Mapping[str, Records], samples: Mapping[str, Samples]
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
