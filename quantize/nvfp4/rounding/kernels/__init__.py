"""The loops of the rounding methods in Triton, for weights that are on a GPU.

A method's own file has its loop in PyTorch or numba, which is what runs on CPUs and what the
kernels are judged by. It imports a file of this folder only where a weight is on a GPU, since
Triton is not everywhere. ``docs/contributors/rounding-on-gpus.md`` says how they are built and what
they should take.
"""

PANEL = 128
"""A kernel goes through so many columns; then one matrix product passes on what they changed to
all others."""
