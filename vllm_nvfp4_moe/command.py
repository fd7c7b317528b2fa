"""The console script ``nvfp4-moe``. It is here, and not in ``quantize``, since that name may mean a
user's own file where this is imported (:mod:`vllm_nvfp4_moe.shadowing`)."""

from quantize.cli import main

__all__ = ["main"]
