"""Adapters as models and files of other programs."""
