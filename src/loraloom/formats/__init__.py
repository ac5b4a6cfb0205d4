"""Adapters on disk: PEFT's layout for plain LoRA, the reference's for mixtures."""

from loraloom.formats.card import model_card
from loraloom.formats.description import describe
from loraloom.formats.files import read_adapter, write_adapter

__all__ = ["describe", "model_card", "read_adapter", "write_adapter"]
