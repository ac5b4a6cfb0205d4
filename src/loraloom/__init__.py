"""Mixtures of LoRA experts: train, evaluate and run many adapters on one frozen base model."""

from loraloom.adapters import ExpertsConfig, LoraConfig, MixLoraConfig
from loraloom.models.attach import attach

__version__ = "0.1.0"
__all__ = ["ExpertsConfig", "LoraConfig", "MixLoraConfig", "attach"]
