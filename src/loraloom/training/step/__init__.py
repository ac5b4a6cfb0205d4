"""The pure part: rows, forward, losses, gradients and optimizers of a round; no files, no clock."""
