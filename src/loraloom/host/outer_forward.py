"""Forwards that others make: transformers' generation, Trainer, trl and PEFT.

They call the base model as if it were any model, with as many rows as they have. A wrapper of the
call asks which adapters the rows have, and runs it in the forward's context. Adapters' auxiliary
losses reach those who compute the loss on the way out; a micro-batch adds its share, so that a step
adds the loss once, however many micro-batches it has. `AdapterModel` shows one adapter on a host as
a model that trainers take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.errors import AdapterError, ModelError
from loraloom.host.forwards import ForwardRequest, ModelInput
from loraloom.host.layout import RowAdapter, name_and_scale
from loraloom.host.prepared_weights import outside_autocast

# The argument by which trl asks a model for `aux_loss`.
_REQUEST = "output_router_logits"
_BASE = "base"


@dataclass(frozen=True)
class Rows:
    """The adapters of the rows that were given, or one of all; beams take their row's."""

    adapters: Sequence[RowAdapter]
    training: bool = False  # dropout and jitter are on, the loss gets adapters' auxiliary losses


# Which rows this thread names, and for the forwards of which model.
_named_rows: ContextVar[tuple[object, Rows | None]] = ContextVar(
    "loraloom_rows", default=(None, None)
)


class OuterForward:
    """Forwards that others make of a module: the base model, or one that calls it.

    `default_rows` returns the adapters of the rows where nobody names them; None: they are the base
    model's. A forward inside another, or inside one of the host's own, passes.
    """

    def __init__(
        self, host: Any, module: nn.Module, default_rows: Callable[[], Rows | None] = lambda: None
    ):
        self._host = host
        self.default_rows = default_rows
        self._signature = signature(module.forward)
        # The call is wrapped, as trl puts a forward of its own in place of a model's. Hooks would
        # not do: after an interrupt torch calls none that could end what another one began.
        self._call = module._call_impl
        module._call_impl = self._run

    @contextmanager
    def of_rows(self, rows: Rows) -> Iterator[None]:
        """Name the adapters of the rows of this thread's forwards."""
        token = _named_rows.set((self, rows))
        try:
            yield
        finally:
            _named_rows.reset(token)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        model, rows = _named_rows.get()
        if model is not self:
            rows = self.default_rows()
        if rows is None or self._host.forwards.is_running:
            return self._call(*args, **kwargs)
        inputs = {**self._signature.bind_partial(*args).arguments, **kwargs}
        wants_loss = bool(inputs.pop(_REQUEST, False))
        self._check_head(rows, inputs)
        with self._host.forwards.run(self._request(rows, inputs)) as (forward, model_inputs):
            output = self._call(**model_inputs)
        loss = self._host.heads.auxiliary_loss(forward.joined_routing(), forward.samples())
        return _add_loss(output, loss, inputs, wants_loss=wants_loss)

    def _request(self, rows: Rows, inputs: dict[str, Any]) -> ForwardRequest:
        """Describe a forward that another program makes with `inputs`, by name."""
        host = self._host
        tokens = inputs.get("input_ids")
        if tokens is None:
            tokens = inputs["inputs_embeds"][..., 0]  # what has the tokens' shape
        names = rows.adapters
        is_prepared = host.forwards.thread.prepared is not None
        if len(names) == 1 or is_prepared:  # within `generate`, beams
            num_beams = len(tokens) // len(names)
            names = [name for name in names for _ in range(num_beams)]
        request = ForwardRequest(
            input_ids=tokens,
            adapters=names,
            mask=inputs.get("attention_mask"),
            model_inputs=inputs,
        )
        if not rows.training:
            return request
        # Nobody can tell whether the trainer scales its loss.
        if host.dtype == torch.float16:
            raise ModelError(
                "training by other programs needs a base model in bfloat16 or float32, got "
                "float16: without loss scaling small gradients become zero; load the model in "
                "another dtype, or train with loraloom, which scales losses"
            )
        if host.gradient_checkpointing:  # as transformers does it
            inputs = {**inputs, "use_cache": False}
        return replace(
            request,
            model_inputs=inputs,
            training=True,
            checkpointing=host.gradient_checkpointing,
            record={},
        )

    def _check_head(self, rows: Rows, inputs: dict[str, Any]) -> None:
        if not inputs.get("fused_lm_head"):
            return
        names = [name for name, _ in map(name_and_scale, rows.adapters) if name is not None]
        head = self._host.base.head
        if any(self._host.adapter(name).own_at(head) for name in names):
            raise AdapterError(
                "trl's loss reads the base model's head, so adapters with a head or tied tokens of "
                "their own need transformers' Trainer or a run"
            )


def _add_loss(output: Any, loss: Tensor | None, inputs: dict[str, Any], *, wants_loss: bool) -> Any:
    if loss is None:
        if wants_loss:
            tensors = (value for value in output.values() if isinstance(value, Tensor))
            output["aux_loss"] = torch.zeros((), device=next(tensors).device)
        return output

    def total(model_loss: Tensor) -> Tensor:
        with outside_autocast(model_loss):
            return model_loss + (loss * _share(inputs)).to(model_loss)

    if isinstance(output, tuple):
        has_labels = any(inputs.get(name) is not None for name in ("labels", "shift_labels"))
        return (total(output[0]), *output[1:]) if has_labels else output
    if output.get("loss") is not None:
        output["loss"] = total(output["loss"])
    output["aux_loss"] = loss
    return output


def _share(inputs: dict[str, Any]) -> Tensor | float:
    """Return the share of a micro-batch in its step, by the tokens in the loss."""
    count = inputs.get("num_items_in_batch")
    # Without a count the trainer averages over micro-batches itself.
    if count is None:
        return 1.0
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs["labels"][..., 1:]
    return (labels != -100).sum() / count


def with_auxiliary_loss(config: Any) -> Any:
    """Show a model's configuration with the fields by which trl finds that there is an aux_loss."""
    # It is the same configuration: what is changed in one is changed in the other.

    def constant(value: object) -> property:
        return property(lambda self: value, lambda self, new_value: None)

    # The loss has its coefficient. With `output_router_logits`, models look for own routers.
    fields: dict[str, Any] = {_REQUEST: constant(False), "router_aux_loss_coef": constant(1.0)}
    fields["__reduce_ex__"] = lambda self, protocol: (with_auxiliary_loss, (config,))
    view = object.__new__(type(type(config).__name__, (type(config),), fields))
    view.__dict__ = config.__dict__
    return view


class TakesCheckpointing:
    """Gradient checkpointing under the names by which trainers switch it, done by the host."""

    host: Any

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.host.gradient_checkpointing

    is_gradient_checkpointing = is_activation_checkpointing  # its older name

    def activation_checkpointing_enable(self, *_: object, **__: object) -> None:
        self.host.enable_gradient_checkpointing()

    gradient_checkpointing_enable = activation_checkpointing_enable

    def activation_checkpointing_disable(self) -> None:
        self.host.enable_gradient_checkpointing(enabled=False)

    gradient_checkpointing_disable = activation_checkpointing_disable


class AdapterModel(TakesCheckpointing, nn.Module):
    """An adapter on a host, as a causal LM: `loss` has its auxiliary loss, `state_dict` is its own.

    The base model is inside, frozen and in eval mode whatever the mode; other adapters on the host
    are neither trained nor saved. In training, dropout draws from torch's own generator, so that a
    trainer that restores its state goes on as if it had not stopped. Without a name it is the base
    model.
    """

    def __init__(self, host: Any, name: str | None):
        super().__init__()
        self.host = host
        self.name = name
        self.adapter = None if name is None else host.adapter(name)
        self.base: Any = host.model
        config = host.model.config
        has_router = self.adapter is not None and self.adapter.config.experts_per_router > 0
        self.config = with_auxiliary_loss(config) if has_router else config
        self.warnings_issued: dict[str, bool] = {}
        self.register_state_dict_post_hook(_leave_base_out)
        self.register_load_state_dict_post_hook(_expect_no_base)
        self._outer_forward = OuterForward(host, self, self._rows)
        self.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **model_inputs: ModelInput,
    ) -> Any:
        return self.base(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            **model_inputs,
        )

    def _rows(self) -> Rows:
        return Rows([self.name], training=self.training and torch.is_grad_enabled())

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **generate_kwargs: object
    ) -> Any:
        adapters = [self.name] * len(input_ids)
        return self.host.generate(input_ids, attention_mask, adapters, **generate_kwargs)

    def train(self, mode: bool = True) -> AdapterModel:
        super().train(mode)
        self.base.eval().get_input_embeddings().train(mode)  # by it NEFTune adds noise
        return self

    def save_pretrained(self, directory: str | Path, **_: object) -> None:
        """Write the adapter's files, as `Host.save` does, over those that are there."""
        if self.name is None:
            raise ModelError("save_pretrained writes an adapter; this view is of the base model")
        self.host.save(self.name, directory, overwrite=True)

    base_model: Any = property(lambda self: self.base.base_model)
    dtype: Any = property(lambda self: self.host.dtype)
    device: Any = property(lambda self: self.host.device)
    generation_config: Any = property(lambda self: self.base.generation_config)
    loss_type: Any = property(lambda self: self.base.loss_type)
    _get_name: Any = property(lambda self: self.base._get_name)  # by which Trainer shifts labels
    get_input_embeddings: Any = property(lambda self: self.base.get_input_embeddings)
    get_output_embeddings: Any = property(lambda self: self.base.get_output_embeddings)
    add_model_tags: Any = property(lambda self: self.base.add_model_tags)


def _leave_base_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}{_BASE}.")]:
        del state[name]
    pointers: set[int] = set()
    for name, tensor in state.items():
        # A head and its embedding may be tied, which safetensors refuses.
        if tensor.data_ptr() in pointers:
            state[name] = tensor.clone()
        pointers.add(tensor.data_ptr())


def _expect_no_base(module: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if _BASE not in name.split(".")]
