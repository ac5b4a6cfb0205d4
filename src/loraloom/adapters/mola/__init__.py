"""MoLA: a mixture of LoRA experts on each adapted projection, more or fewer by layer."""
