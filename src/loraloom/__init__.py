"""Mixtures of LoRA experts: train, evaluate and run many adapters on one frozen base model."""

from loraloom.config.adapter import ExpertsConfig, LoraConfig, MixLoraConfig
from loraloom.models.attach import attach

__version__ = "0.1.0"
__all__ = ["ExpertsConfig", "LoraConfig", "MixLoraConfig", "attach"]
