"""What files of adapters need to know of the base model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseInfo:
    """A base model, as adapters' files see it.

    Args:
        name_or_path: As it was loaded.
        model_type: Its family's name in transformers.
        layers_path: Path of the decoder layers, `model.layers` say.
        attention: Name of the attention block.
        ffn: Name of the FFN block.
        attention_projections: Names of its projections.
        ffn_projections: Names of its projections.
        activation: Name of the FFN's activation in the model's config.
        num_layers: Decoder layers.
        hidden_size: Width of the hidden states.
        shapes: `block.projection` to (out_features, in_features).
        num_parameters: Parameters of the whole base model.
        fingerprint: Hash of the shapes and of a few weights rounded to bfloat16.
    """

    name_or_path: str
    model_type: str
    layers_path: str
    attention: str
    ffn: str
    attention_projections: tuple[str, ...]
    ffn_projections: tuple[str, ...]
    activation: str
    num_layers: int
    hidden_size: int
    shapes: dict[str, tuple[int, int]]
    num_parameters: int
    fingerprint: str
