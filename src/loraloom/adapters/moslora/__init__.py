"""MoSLoRA: a LoRA with a trained mixer of its subspaces between A and B."""
