"""NVFP4 numbers: turning float weights into codes and scales, and back.

``format`` defines the number format. ``scales`` holds the rules that choose scales, ``rounding``
the methods that choose codes from calibration data, and ``kernels`` the fast implementations.
``kernels.kernel.quantize_weights`` is the main entry point. This room may import
``quantize.errors`` and ``quantize.registry`` only.
"""
