"""DynMoLE: LoRA experts on each projection, more of them where a router is undecided."""
