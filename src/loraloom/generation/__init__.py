"""Inference: a host with its adapters, and text that they generate."""
