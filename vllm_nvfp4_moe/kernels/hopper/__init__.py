"""The Hopper kernels: their CUDA sources, and what Python packs, builds and launches for them.

``registry.KERNELS`` has them by name. docs/contributors/hopper-kernel.md says how they work.
"""
