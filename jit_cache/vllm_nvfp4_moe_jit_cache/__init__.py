"""Compiled kernels, beside this file. ``vllm_nvfp4_moe.kernels.jit`` looks for them here."""
