"""Measurements: how long a layer, a training step and a decoding step take, and in what memory."""
