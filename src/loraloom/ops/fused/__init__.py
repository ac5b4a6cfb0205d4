"""FFN blocks and DoRA on accelerators: elementwise work in one pass, as operators of PyTorch."""
