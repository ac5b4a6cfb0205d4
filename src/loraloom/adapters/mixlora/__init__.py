"""MixLoRA and MixDoRA: a router and LoRA experts in each FFN block, LoRA on attention."""
