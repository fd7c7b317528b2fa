"""A checkpoint on disk: which tensors it has, in which format, and reading them."""
