"""A checkpoint on disk: its files, its tensors, their formats, and reading them.

Start at ``reader.Checkpoint``; ``hub.resolve`` turns a hub id into a folder first. ``sources``
shows weights that are already quantized (FP8, MXFP8, MXFP4) as floats. This room may import
``quantize.nvfp4``, ``quantize.errors`` and ``quantize.registry``.
"""
