"""Adapters that were trained apart as one adapter, and a router that chooses among them."""
