"""One adapter on a host as a model of its own: what transformers' Trainer and trl's trainers take.

Axes: B batch, L sequence.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraloom.errors import ModelError
from loraloom.models.door import Rows, with_auxiliary_loss

if TYPE_CHECKING:
    from loraloom.models.host import Host

_BASE = "base"
_CHECKPOINTING_SETTINGS = {"use_reentrant": False, "preserve_rng_state": True}
"""Arguments of `torch.utils.checkpoint` that say what a host does anyway."""


class TakesCheckpointing:
    """Gradient checkpointing under the names by which trainers switch it, done by the host."""

    host: Host

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether decoder layers are recomputed in the backward pass."""
        return self.host.gradient_checkpointing

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The older name of `is_activation_checkpointing`."""
        return self.host.gradient_checkpointing

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute decoder layers in the backward pass."""
        settings = activation_checkpointing_kwargs or {}
        other = {
            name: value
            for name, value in settings.items()
            if value is not None and value != _CHECKPOINTING_SETTINGS.get(name)
        }
        if every_n_layers != 1 or offload or other:
            asked = other | {"every_n_layers": every_n_layers, "offload": offload}
            raise ModelError(
                "gradient checkpointing recomputes every decoder layer, non-reentrantly and on its "
                f"device; got {asked}; leave these settings out"
            )
        self.host.enable_gradient_checkpointing()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        """Do `activation_checkpointing_enable` under its older name."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **settings)

    def activation_checkpointing_disable(self) -> None:
        """Keep activations."""
        self.host.enable_gradient_checkpointing(enabled=False)

    def gradient_checkpointing_disable(self) -> None:
        """Do `activation_checkpointing_disable` under its older name."""
        self.activation_checkpointing_disable()


class AdapterModel(TakesCheckpointing, nn.Module):
    """An adapter on a host, as a causal LM: `loss` has its auxiliary loss, `state_dict` is its own.

    The base model is inside, frozen and in eval mode whatever the mode; other adapters on the host
    are neither trained nor saved. In training, dropout draws from torch's own generator, so that a
    trainer that restores its state goes on as if it had not stopped.
    """

    def __init__(self, host: Host, name: str | None):
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
        self._door = host.door(self, self._rows)
        self.eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **model_inputs: Any,
    ) -> Any:
        """Run rows of the adapter."""
        try:
            return self.base(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                labels=labels,
                **model_inputs,
            )
        except KeyboardInterrupt:
            self._door.close()
            raise

    def _rows(self) -> Rows:
        return Rows([self.name], training=self.training and torch.is_grad_enabled())

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **generate_kwargs: Any
    ) -> Any:
        """Generate with transformers' `generate`; see `Host.generate`."""
        adapters = [self.name] * len(input_ids)
        return self.host.generate(input_ids, attention_mask, adapters, **generate_kwargs)

    def train(self, mode: bool = True) -> AdapterModel:
        """Train the adapter; the base model stays in eval mode."""
        super().train(mode)
        self.base.eval()
        return self

    def save_pretrained(self, directory: str | Path, **_: Any) -> None:
        """Write the adapter's files, as `Host.save` does, over those that are there."""
        if self.name is None:
            raise ModelError("save_pretrained writes an adapter; this view is of the base model")
        self.host.save(self.name, directory, overwrite=True)

    @property
    def base_model(self) -> nn.Module:
        """The decoder without its head."""
        return self.base.base_model

    @property
    def dtype(self) -> torch.dtype:
        """The base model's."""
        return self.host.dtype

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.host.device

    @property
    def generation_config(self) -> Any:
        """The base model's."""
        return self.base.generation_config

    @property
    def loss_type(self) -> str:
        """Which of transformers' losses the base model computes."""
        return self.base.loss_type

    def get_input_embeddings(self) -> nn.Module:
        """Return the base model's embeddings."""
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """Return the base model's head."""
        return self.base.get_output_embeddings()

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Pass tags for model cards on to the base model."""
        self.base.add_model_tags(tags)


def _leave_base_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}{_BASE}.")]:
        del state[name]
    seen: set[int] = set()
    for name, tensor in state.items():
        if tensor.data_ptr() in seen:  # tied, a head and its embedding, which safetensors refuses
            state[name] = tensor.clone()
        seen.add(tensor.data_ptr())


def _expect_no_base(module: nn.Module, incompatible_keys: Any) -> None:
    missing = incompatible_keys.missing_keys
    missing[:] = [name for name in missing if _BASE not in name.split(".")]
