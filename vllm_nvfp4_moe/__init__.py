"""vLLM plugin: ``vllm serve CKPT --quantization nvfp4_moe``.

vLLM calls :func:`register` at the start of each of its processes (entry point
``vllm.general_plugins``). Importing this package loads nothing heavy.
"""

from vllm_nvfp4_moe import shadowing
from vllm_nvfp4_moe.registration import register

__all__ = ["register"]

shadowing.install()
