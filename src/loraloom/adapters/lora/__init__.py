"""LoRA, rsLoRA and DoRA: one low-rank update on each adapted projection."""
