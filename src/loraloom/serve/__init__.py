"""Serving: an engine that continues rows of many adapters at once, and HTTP in front of it."""
