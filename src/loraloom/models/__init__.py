"""The base model: where adapters attach, and which rows of a batch are whose."""
