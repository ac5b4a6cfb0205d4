"""A transformers model, read once: its decoder layers, each a list of blocks."""
