"""HydraLoRA: one A, several B, and a router on each adapted projection."""
