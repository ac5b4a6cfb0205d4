"""Evaluation: choice questions, held-out loss, and the tasks of lm-evaluation-harness."""
