"""Pure tensor functions: the compute core."""
