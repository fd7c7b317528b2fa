"""How experts come from a checkpoint's files into a layer's parameters."""
