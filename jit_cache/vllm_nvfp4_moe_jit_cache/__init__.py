"""Compiled kernels, beside this file. ``quantize.native.jit`` looks for them here."""
