"""The training engine: many jobs, each with its adapter, in the same steps on one base model."""
