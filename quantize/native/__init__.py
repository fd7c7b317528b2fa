"""Compiling this project's own sources where they run: C++ for CPUs, CUDA for GPUs.

``jit`` compiles, and keeps what it has compiled; ``processor`` says what this host's processor has;
``environment`` has the variables that both packages read.
"""
