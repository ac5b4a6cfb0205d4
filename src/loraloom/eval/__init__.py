"""Evaluation: choice questions scored by log-likelihood."""
