"""SMoRA: a LoRA whose ranks are experts; a router chooses among them for each token."""
