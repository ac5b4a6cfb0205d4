"""How a forward of the base model begins and what it returns: adapters, mode, computation, result.

Axes: B batch (rows), L sequence (tokens of a row), D hidden, V vocabulary.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from transformers import Cache

from loraloom.adapters.routed.method import prompt_router_of
from loraloom.adapters.segment import SampleTokens
from loraloom.base.sharding import recovering
from loraloom.errors import AdapterError, ModelError
from loraloom.host.choice import Choice
from loraloom.host.forward import ForwardContext, current_forward, running
from loraloom.host.layout import Layout, RowAdapter, RowAdapters, SampleLengths, make_layout
from loraloom.host.prepared_weights import (
    PreparedWeights,
    Record,
    ScaledRows,
    forms_of,
    is_autocast_on,
)
from loraloom.host.registry import AdapterRegistry
from loraloom.host.stacked_forward import StackedForward
from loraloom.routing.record import LayerRouting

# An input of a base model besides tokens and their mask; types of models differ in these.
ModelInput = Tensor | Cache | Sequence[Any] | Mapping[str, Any] | bool | int | float | str | None


@dataclass(frozen=True)
class ForwardRequest:
    """A forward of the base model that is to run."""

    input_ids: Tensor  # [B, L], or a tensor of this shape
    adapters: RowAdapters = None
    # 1 at real tokens, [B, L] or [B, past + L]; None, or a mask of another kind: all are real
    mask: Tensor | None = None
    model_inputs: Mapping[str, Any] = field(default_factory=dict)  # the base model's other inputs
    sample_keys: Sequence[int] | None = None
    sample_lengths: SampleLengths | None = None  # of packed rows
    training: bool = False
    checkpointing: bool = False  # recomputes layers, in training only
    record: Record | None = None

    @property
    def is_packed(self) -> bool:
        return self.sample_lengths is not None

    @property
    def recomputes_layers(self) -> bool:
        return self.training and self.checkpointing

    @property
    def caches(self) -> list[Any]:
        """The key-value cache, whose argument changed its name within transformers 5."""
        inputs = [self.model_inputs.get(name) for name in ("cache", "past_key_values")]
        return [cache for cache in inputs if cache is not None]


@dataclass(frozen=True)
class HostOutput:
    """The result of a forward: logits or states, and if requested the cache and the loss.

    `routing` lists, for each mixture by name, the decisions of each router for real tokens, sorted
    by the scales of the rows. In training, `samples` names the sample of each of these tokens.
    """

    logits: Any = None  # [B, L, V], of a call of the host
    last_hidden_state: Any = None  # after the final norm, [B, L, D], of `Host.hidden`
    past_key_values: Any = None
    loss: Tensor | None = None
    routing: dict[str, list[LayerRouting]] = field(default_factory=dict)
    samples: dict[str, list[SampleTokens] | None] = field(default_factory=dict)


class ThreadState(threading.local):
    """What a thread has set for its own forwards."""

    training: bool = False
    prepared: PreparedWeights | None = None

    @contextmanager
    def using(self, prepared: PreparedWeights) -> Iterator[None]:
        """Compute this thread's forwards with prepared weights."""
        outer = self.prepared
        self.prepared = prepared
        try:
            yield
        finally:
            self.prepared = outer


def _prompts_of(request: ForwardRequest) -> list[list[int]]:
    """Read the tokens by which adapters are chosen: what precedes labels, or a whole text."""
    input_ids = request.input_ids
    mask = torch.ones(input_ids.shape) if request.mask is None else request.mask.cpu()
    if input_ids.is_floating_point() or mask.shape != input_ids.shape:
        raise _needs_prompts()
    is_read = mask.bool()
    labels = request.model_inputs.get("labels")
    if labels is not None:
        precedes_labels = is_read & ((labels.cpu() != -100).cumsum(1) == 0)
        has_prompt = precedes_labels.sum(1, keepdim=True) > 1
        is_read = torch.where(has_prompt, precedes_labels, is_read)
    rows = zip(input_ids.cpu(), is_read, strict=True)
    return [tokens[is_read_here].tolist() for tokens, is_read_here in rows]


def _needs_prompts() -> AdapterError:
    return AdapterError(
        "an adapter that is chosen by prompt needs a row's tokens in one forward, without a cache; "
        "call host.choose first and pass its choice, or call host.generate"
    )


class Forwards:
    """Runs forwards of a base model: threads take turns, and each forward has its context."""

    def __init__(
        self,
        registry: AdapterRegistry,
        lock: threading.RLock,
        run_decoder: Callable[..., Any],
        choose: Callable[..., Sequence[Choice]],
    ):
        self.run_decoder = run_decoder  # the base model up to its final norm
        self.thread = ThreadState()
        self._choose = choose
        # For each cache, the names of its rows' adapters, and which were chosen by their prompts.
        self._chosen = WeakKeyDictionary[Any, tuple[list[RowAdapter], list[RowAdapter]]]()
        self._registry = registry
        self.model = registry.model
        self._lock = lock
        # The argument for the cache changed its name within transformers 5.
        names = signature(self.model.base_model.forward).parameters
        self.cache_argument = "cache" if "cache" in names else "past_key_values"

    @property
    def device(self) -> torch.device:
        return self.model.get_input_embeddings().weight.device

    @property
    def is_running(self) -> bool:
        """Whether a forward of this base model runs in this thread."""
        return current_forward(self._registry.wiring) is not None

    @contextmanager
    def run(self, request: ForwardRequest) -> Iterator[tuple[ForwardContext, Mapping[str, Any]]]:
        """Run a forward; within the lock nobody merges an adapter that its rows have.

        Yields:
            The forward's context, and the base model's inputs other than tokens and mask.
        """
        with self._lock:
            self._registry.check_attached()
            if not request.training:
                request = replace(request, adapters=self.choose_adapters(request))
            model_inputs = self._without_cache(request)
            forward = self.open(request)
            with running(forward), recovering(self.model):
                yield forward, model_inputs

    def choose_adapters(self, request: ForwardRequest) -> list[RowAdapter]:
        """Name rows' adapters; those that are chosen by prompt, by the row's tokens."""
        num_rows = len(request.input_ids)
        rows = self._registry.rows(request.adapters, num_rows)  # a text is no list of names
        names: list[RowAdapter] = [*(request.adapters or [None] * num_rows)]
        if all(row is None or prompt_router_of(row[0]) is None for row in rows):
            return names
        caches = request.caches
        is_continued = any(cache.get_seq_length() for cache in caches)
        if caches and (is_continued or request.is_packed):
            earlier_names, chosen = self._chosen.get(caches[0], (None, []))
            if earlier_names == names:
                return chosen
        if is_continued or request.is_packed:
            raise _needs_prompts()
        choices = self._choose(_prompts_of(request), names)
        chosen: list[RowAdapter] = [choice.adapter for choice in choices]
        self._chosen.update(dict.fromkeys(caches, (names, chosen)))
        return chosen

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Run the base model alone."""
        with self._lock, running(None), recovering(self.model):
            yield

    def _without_cache(self, request: ForwardRequest) -> Mapping[str, Any]:
        """Switch the cache off where it would be wrong."""
        # Layers that are recomputed would fill it twice, and transformers would let the samples of
        # a packed row see each other.
        if not (request.recomputes_layers or request.is_packed):
            return request.model_inputs
        if request.model_inputs.get("use_cache", False) or request.caches:
            raise ModelError(
                "a forward of packed rows, or with gradient checkpointing, does not support a "
                f"cache; remove use_cache and {self.cache_argument}, or call "
                "enable_gradient_checkpointing(False)"
            )
        return {"use_cache": False, **request.model_inputs}

    def open(self, request: ForwardRequest) -> ForwardContext:
        """Make the context of a forward whose rows' adapters are named."""
        batch_size, length = request.input_ids.shape
        rows = self._registry.rows(request.adapters, batch_size)
        self._check_not_compiled()
        keys = None
        if request.training:
            self._registry.check_unmerged("train")
            for adapter, _ in filter(None, rows):
                adapter.check_is_trained()
            keys = self._sample_keys(request)
        layout = make_layout(
            rows, length, request.mask, keys, self.device, sample_lengths=request.sample_lengths
        )
        return ForwardContext(
            owner=self._registry.wiring,
            layout=layout,
            checkpointing=request.recomputes_layers,
            record=request.record,
            forms=forms_of(self.thread.prepared),
            stacked=self._stack(request, rows, layout),
        )

    def _check_not_compiled(self) -> None:
        is_compiled = (
            torch.compiler.is_compiling()
            or get_eval_frame_callback() is not None
            or self.model._compiled_call_impl is not None
        )
        if is_compiled and torch.is_grad_enabled():
            raise ModelError(
                "forwards with gradients must not be compiled, because torch.compile ignores "
                "updates of the base's outputs; remove torch.compile (torch_compile of Trainer)"
            )

    def _sample_keys(self, request: ForwardRequest) -> list[int]:
        """Return the samples' keys of random numbers; by default torch's generator draws them."""
        count = len(request.input_ids)
        if request.sample_lengths is not None:
            count = sum(map(len, request.sample_lengths))
        if request.sample_keys is None:
            # Who saves and restores the generator's state goes on with these numbers.
            return torch.randint(2**62, (count,)).tolist()
        keys = [int(key) for key in request.sample_keys]
        if len(keys) != count:
            samples = "samples" if request.is_packed else "rows"
            raise AdapterError(
                f"sample_keys must have one key for each of the {count} {samples}, got {len(keys)}"
            )
        return keys

    def _stack(
        self, request: ForwardRequest, rows: ScaledRows, layout: Layout
    ) -> StackedForward | None:
        """Compute like adapters together in a small forward without gradients and padding."""
        has_gradients = request.training or torch.is_grad_enabled()
        if self.thread.prepared is None or has_gradients or not any(rows) or layout.has_padding:
            return None
        dtype = self.model.dtype
        if is_autocast_on(self.device.type):
            # a quantized layer's outputs have its inputs' dtype, whatever autocast's is
            if self._registry.base.quantization:
                return None
            dtype = torch.get_autocast_dtype(self.device.type)
        plan = self.thread.prepared.plan(rows, request.input_ids.shape[1], dtype, self.device)
        return None if plan is None else StackedForward(plan, request.record)
