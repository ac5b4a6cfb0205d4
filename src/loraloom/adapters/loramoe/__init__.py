"""LoRAMoE: LoRA experts on each FFN projection, all mixed by a router; LoRA on attention."""
