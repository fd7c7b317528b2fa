"""A checkpoint's routed experts: their gate, up and down tensors, and the gate that they apply.

Start at ``find.find``, which returns one ``group.ExpertGroup`` for each layer's experts.
``identify.identify`` finds the gate by running the model's own code, and ``linears.find`` finds the
dense linears. This room may import ``quantize.checkpoint``, ``quantize.nvfp4``,
``quantize.errors`` and ``quantize.registry``.
"""
