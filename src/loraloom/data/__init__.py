"""Data: reading, prompts, tokens; choice tasks for training and evaluation."""
