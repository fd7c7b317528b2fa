"""Runs a Hopper kernel's CUDA source on a CPU (``cuda_emulation.h``).

All of ``HopperKernel.run`` takes part; what it gets of PyTorch's CUDA is replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_nvfp4_moe.kernels.hopper import launch
from vllm_nvfp4_moe.kernels.hopper.kernel import HopperKernel
from vllm_nvfp4_moe.kernels.hopper.source import inlined
from vllm_nvfp4_moe.kernels.jit import KernelError

HEADER = Path(__file__).with_name("cuda_emulation.h")
CPU = torch.device("cpu")
GUARD = 1024
"""Elements before and after each tensor that the kernel gets to write."""


def body(kernel: HopperKernel) -> str:
    """The CUDA source of ``kernel``, without what only a GPU can do."""
    return inlined(kernel.file)


def compiled(folder: Path, source: str, kernel: HopperKernel) -> ctypes.CDLL:
    """``source``, as of :func:`body`, compiled for this host and loaded."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    file, library = folder / "kernel.cpp", folder / "kernel.so"
    file.write_text(source)
    (upper,) = set(re.findall(r"mov\.b64 desc, {%\d+, (\w+)}", kernel.source()))
    (columns,) = set(re.findall(r"wgmma.mma_async.sync.aligned.m64n\d+k(\d+)", kernel.source()))
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-ftree-vectorize", "-shared", "-fPIC",
         "-fno-strict-aliasing", "-fno-extern-tls-init", "-U_FORTIFY_SOURCE",
         f"-DDESCRIPTOR={upper}", f"-DOPERAND={32 // int(columns)}", "-include", HEADER,
         "-o", library, file],
        check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(library))
    loaded.emulation_failure.restype = ctypes.c_char_p
    loaded.emulation_seed.argtypes = [ctypes.c_uint64]
    loaded.emulation_source.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    return loaded


def build(folder: Path, source: str, kernel: HopperKernel) -> ctypes.CDLL:
    """As :func:`compiled`, looked at and prepared as ``HopperKernel.library`` does it."""
    loaded = compiled(folder, source, kernel)
    launch.check_library(loaded, kernel.tile_shapes)
    launch.check(loaded, loaded.prepare())
    return loaded


class Emulated:
    """``run`` is as that of ``kernel``; tensors that it makes are poisoned, between guards."""

    def __init__(
        self, library: ctypes.CDLL, kernel: HopperKernel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.library, self.kernel, self.patch = library, kernel, monkeypatch

    def run(
        self,
        x: torch.Tensor,
        experts: Any,
        *args: Any,
        seed: int = 1,
        processors: int = 3,
        **options: Any,
    ) -> torch.Tensor:
        made: list[torch.Tensor] = []

        def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            count = torch.Size(shape).numel()
            whole = torch.full((GUARD + count + GUARD,), poison(dtype), dtype=dtype)
            made.append(whole)
            inner = whole[GUARD : GUARD + count]
            self.library.emulation_source(inner.data_ptr(), count * inner.element_size())
            return inner.view(shape)

        self.library.emulation_seed(seed)
        for weights in (experts.w13, experts.w2):
            self.library.emulation_source(weights.data_ptr(), weights.numel())
        properties = SimpleNamespace(multi_processor_count=processors)
        stream = SimpleNamespace(cuda_stream=None)
        with self.patch.context() as patch:
            patch.setattr(self.kernel, "library", lambda device: self.library)
            patch.setattr(torch, "empty", empty)
            patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
            patch.setattr(torch.cuda, "current_stream", lambda: stream)
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
            try:
                out = self.kernel.run(x, experts, *args, **options)
            except KernelError:
                if failure := self.library.emulation_failure().decode():
                    raise AssertionError(failure) from None
                raise
        for whole in made:
            untouched = torch.full((GUARD,), poison(whole.dtype), dtype=whole.dtype)
            for guard in (whole[:GUARD], whole[-GUARD:]):
                assert guard.view(torch.uint8).equal(untouched.view(torch.uint8))
        return out

    def twice(self, *args: Any, **options: Any) -> torch.Tensor:
        """What both of two orders of events give."""
        first, second = (self.run(*args, seed=seed, **options) for seed in (1, 2))
        assert torch.equal(first, second)
        return first


def poison(dtype: torch.dtype) -> float:
    """No index of anything, or NaN."""
    return torch.nan if dtype.is_floating_point else -(2**30)
