"""This package's own kernels for Hopper GPUs, as a way to run vLLM's layers.

``support`` says which layers they run and why not others, ``method`` packs a layer's weights, and
``experts`` is the class through which vLLM calls them. The kernels are in ``kernels/hopper``.
"""
