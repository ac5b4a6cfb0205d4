"""The base model with its adapters: forwards whose rows have different adapters."""
