"""Variables by which users say what is compiled, with what, and where it is kept.

=====================  ============================================================================
variable               meaning
=====================  ============================================================================
``NVFP4_MOE_CPP``      ``0`` has numba compile the kernels for CPUs, not the C++ compiler; ``1``
                       is the default.
``NVFP4_MOE_CACHE``    The folder of compiled kernels, by default ``nvfp4_moe`` in vLLM's cache
                       (``VLLM_CACHE_ROOT``).
``CXX``                The C++ compiler, and words that come before its others.
``CUDA_HOME``          CUDA's folder; so is ``CUDA_PATH``.
=====================  ============================================================================

They are read when a function here is called, not when it is imported. An empty variable counts as
one that is not set.
"""

from __future__ import annotations

import os
from pathlib import Path

from quantize.errors import QuantizeError

CPP = "NVFP4_MOE_CPP"
CACHE = "NVFP4_MOE_CACHE"


configured: dict[str, str] = {}
"""What a program that imports this says in the place of variables, by their names. It wins."""


def said(name: str) -> str | None:
    """What the user says of a variable; None for nothing."""
    return configured.get(name) or os.environ.get(name) or None


def cpp() -> bool:
    """Whether kernels for CPUs may be compiled from C++ (``NVFP4_MOE_CPP``).

    Raises:
        QuantizeError: if the variable is neither 0 nor 1.
    """
    asked = said(CPP) or "1"
    if asked not in ("0", "1"):
        raise QuantizeError(f"{CPP}={asked} in the environment: must be 0 or 1")
    return asked == "1"


def cache() -> Path | None:
    """The folder in which compiled kernels are kept (``NVFP4_MOE_CACHE``); it may not exist. None
    if nothing says where it is: users of containers may have no home directory."""
    if folder := said(CACHE):
        return Path(folder).absolute()
    # As vLLM finds its own (vllm.envs), which is not imported for it.
    root = os.environ.get("VLLM_CACHE_ROOT") or os.path.join(  # noqa: PTH118
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "vllm"
    )
    folder = os.path.expanduser(root)  # noqa: PTH111 (without a home, Path raises)
    return Path(folder, "nvfp4_moe") if Path(folder).is_absolute() else None


def cuda_home() -> str | None:
    """CUDA's folder by ``CUDA_HOME``, else by ``CUDA_PATH``; None if neither is set."""
    return os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or None


def cxx() -> str | None:
    """The C++ compiler, if ``CXX`` says which."""
    return os.environ.get("CXX") or None
