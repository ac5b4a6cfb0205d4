"""Routers: which experts a token uses, what that costs, and how the load spreads."""
