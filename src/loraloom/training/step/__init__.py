"""The pure part: rows, forward, losses, gradients and optimizers of a fused step."""
