"""Compiles this package's CUDA sources with nvcc at first use, and keeps what comes out.

What is compiled lies in ``$NVFP4_MOE_CACHE``, by default ``~/.cache/vllm_nvfp4_moe``, under a
hash of all that it depends on. Nothing is linked to PyTorch: kernels take pointers, through ctypes.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

VARIABLE = "NVFP4_MOE_CACHE"

logger = logging.getLogger("vllm.nvfp4_moe.jit")
"""Below vLLM's, whose handlers it has in a server."""


class KernelError(RuntimeError):
    """A kernel cannot be built or did not run; the message says why."""


def nvcc() -> Path:
    """The compiler: of ``$CUDA_HOME``, on the path, or in ``/usr/local/cuda``.

    Raises:
        KernelError: if there is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = [Path(home, "bin", "nvcc")] if home else []
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path))
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    for path in found:
        if path.is_file():
            return path
    raise KernelError("no nvcc: not in $CUDA_HOME, on the path or in /usr/local/cuda")


def build(source: str, architecture: str) -> Path:
    """The shared library that CUDA C++ ``source`` compiles to.

    Args:
        architecture: "90a", say.

    Raises:
        KernelError: with what nvcc says.
    """
    compiler = nvcc()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    options = [
        "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC",
        "-gencode", f"arch=compute_{architecture},code=sm_{architecture}",
    ]  # fmt: skip
    key = "\0".join([version.stdout, *options, source])
    default = Path.home() / ".cache" / "vllm_nvfp4_moe"
    folder = Path(os.environ.get(VARIABLE) or default)
    library = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if library.exists():
        return library
    logger.info("Compiling a kernel for sm_%s with %s, once: %s", architecture, compiler, library)
    folder.mkdir(parents=True, exist_ok=True)
    # Ranks may compile side by side: each in a folder of its own, and the last one's stays.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        file, made = Path(temporary, "kernel.cu"), Path(temporary, "kernel.so")
        file.write_text(source)
        command = [str(compiler), *options, "-o", str(made), str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise KernelError(f"nvcc failed: {(done.stderr or done.stdout)[-2000:]}")
        made.replace(library)
    return library


def load(source: str, architecture: str) -> ctypes.CDLL:
    """As :func:`build`, loaded."""
    try:
        return ctypes.CDLL(str(build(source, architecture)))
    except OSError as error:
        raise KernelError(f"cannot be built or loaded: {error}") from error
