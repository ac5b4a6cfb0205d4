"""Adapters on disk: PEFT's layout for plain LoRA, the reference's for mixtures."""

from loraloom.formats.card import model_card
from loraloom.formats.description import AdapterDescription, describe
from loraloom.formats.files import read_adapter, write_adapter

__all__ = ["AdapterDescription", "describe", "model_card", "read_adapter", "write_adapter"]
