"""Adapters on disk: PEFT's layout for plain LoRA, the reference's for mixtures."""

from loraloom.formats.files import describe, model_card, read_adapter, write_adapter

__all__ = ["describe", "model_card", "read_adapter", "write_adapter"]
