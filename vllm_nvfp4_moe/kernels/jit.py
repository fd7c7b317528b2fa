"""Compiles this package's CUDA sources with nvcc at first use, and keeps what comes out.

What is compiled lies in ``$NVFP4_MOE_CACHE``, by default ``~/.cache/vllm_nvfp4_moe``, under a
hash of all that it depends on. Nothing is linked to PyTorch: kernels take pointers, through ctypes.
A library's symbols are hidden but for those that its source marks as visible by default.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import shutil
import subprocess
import tempfile
from pathlib import Path

from vllm_nvfp4_moe import settings

logger = logging.getLogger("vllm.nvfp4_moe.jit")
"""Below vLLM's logger, whose handlers it has in a server."""


class KernelError(RuntimeError):
    """A kernel cannot be built or did not run; the message says why."""


def nvcc() -> Path:
    """The path of the compiler: of ``$CUDA_HOME``, on the path, or in ``/usr/local/cuda``.

    Raises:
        KernelError: if there is none.
    """
    home = settings.cuda_home()
    found = [Path(home, "bin", "nvcc")] if home else []
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path))
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    for path in found:
        if path.is_file():
            return path
    raise KernelError("no nvcc: not in $CUDA_HOME, on the path or in /usr/local/cuda")


def build(source: str, architecture: str) -> Path:
    """Compile CUDA C++, or find what it was compiled to before.

    Args:
        source: the whole text, without includes of ours.
        architecture: for example "90a".

    Returns:
        The path of the shared library.

    Raises:
        KernelError: with what nvcc says.
    """
    compiler = nvcc()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    options = [
        "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden",
        "-gencode", f"arch=compute_{architecture},code=sm_{architecture}",
    ]  # fmt: skip
    key = "\0".join([version.stdout, *options, source])
    folder = settings.cache()
    library = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if library.exists():
        return library
    logger.info("Compiling a kernel for sm_%s with %s, once: %s", architecture, compiler, library)
    folder.mkdir(parents=True, exist_ok=True)
    # Ranks may compile side by side. Each does in a folder of its own, and the last one's library
    # stays.
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
    """Load the library of :func:`build`, whose arguments and errors it has."""
    try:
        return ctypes.CDLL(str(build(source, architecture)))
    except OSError as error:
        raise KernelError(f"cannot be built or loaded: {error}") from error
