"""Which tensors are whose gate, up and down, and which gate the experts apply."""
