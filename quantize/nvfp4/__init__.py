"""Bits from floats: the NVFP4 format, its scales, its roundings, and kernels that are fast."""
