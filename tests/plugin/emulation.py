"""Runs a Hopper kernel's CUDA source on a CPU (``cuda_emulation.h``).

All of ``HopperKernel.run`` takes part; what it gets of PyTorch's CUDA is replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantize.native.jit import KernelError
from vllm_nvfp4_moe.kernels.hopper import launch
from vllm_nvfp4_moe.kernels.hopper.kernel import HopperKernel
from vllm_nvfp4_moe.kernels.hopper.source import ORDINARY, Form, inlined

HEADER = Path(__file__).with_name("cuda_emulation.h")
CPU = torch.device("cpu")

_made: dict[tuple[str, ...], Path] = {}
"""Libraries by what they come from. Several files run the same sources."""


def body(kernel: HopperKernel, form: Form = ORDINARY) -> str:
    """The CUDA source of ``kernel``, without what only a GPU can do."""
    # One OS thread runs all: dynamic shared memory is the header's, by its plain name.
    return inlined(kernel.file, form).replace("extern __shared__", "extern")


def compiled(folder: Path, source: str, kernel: HopperKernel) -> ctypes.CDLL:
    """``source``, as of :func:`body`, compiled for this host and loaded. A library is a copy for
    its caller alone: it has variables."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    file, library = folder / "kernel.cpp", folder / "kernel.so"
    file.write_text(source)
    (upper,) = set(re.findall(r"mov\.b64 desc, {%\d+, (\w+)}", kernel.source()))
    (columns,) = set(re.findall(r"wgmma.mma_async.sync.aligned.m64n\d+k(\d+)", kernel.source()))
    options = (f"-DDESCRIPTOR={upper}", f"-DOPERAND={32 // int(columns)}")
    if made := _made.get((source, *options)):
        shutil.copyfile(made, library)
    else:
        subprocess.run(
            [compiler, "-std=c++17", "-O2", "-ftree-vectorize", "-shared", "-fPIC",
             "-fno-strict-aliasing", "-U_FORTIFY_SOURCE", *options, "-include", HEADER,
             "-o", library, file],
            check=True,
        )  # fmt: skip
        _made[source, *options] = library
    loaded = ctypes.CDLL(str(library))
    loaded.emulation_failure.restype = ctypes.c_char_p
    loaded.emulation_begin.argtypes = [ctypes.c_uint64]
    loaded.emulation_mutants.argtypes = [ctypes.c_uint64]
    loaded.emulation_allocate.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_char_p]
    loaded.emulation_allocate.restype = ctypes.c_void_p
    return loaded


def build(folder: Path, source: str, kernel: HopperKernel) -> ctypes.CDLL:
    """As :func:`compiled`, looked at and prepared as ``HopperKernel.library`` does it."""
    loaded = compiled(folder, source, kernel)
    launch.check_library(loaded, kernel.tile_shapes)
    launch.check(loaded, loaded.prepare())
    return loaded


class Emulated:
    """``run`` is as that of ``kernel``. All tensors that the kernel gets lie between pages that it
    may not touch; those that it makes begin as NaN, or as no index of anything."""

    def __init__(
        self,
        library: ctypes.CDLL,
        kernel: HopperKernel,
        monkeypatch: pytest.MonkeyPatch,
        form: Form = ORDINARY,
    ) -> None:
        self.library, self.kernel, self.patch, self.form = library, kernel, monkeypatch, form

    def allocate(self, count: int, dtype: torch.dtype, name: str) -> torch.Tensor:
        """``[count]``, there until the next run, and poisoned."""
        size = max(count, 1) * dtype.itemsize
        start = self.library.emulation_allocate(size, 4 if size % 16 else 16, name.encode())
        memory = torch.frombuffer((ctypes.c_char * size).from_address(start), dtype=dtype)
        if dtype == torch.int32:
            memory.fill_(-(2**30))  # else all bits are set: NaN as any float
        return memory[:count]

    def copied(self, tensor: torch.Tensor, name: str) -> torch.Tensor:
        """``tensor`` in such memory, with the same strides."""
        if tensor.data_ptr() % 16 or tensor.numel() == 0:
            return tensor  # which is refused, or not read
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        memory = self.allocate(1 + sum((n - 1) * step for n, step in steps), tensor.dtype, name)
        return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)

    def run(
        self,
        x: torch.Tensor,
        experts: Any,
        ids: torch.Tensor,
        weights: torch.Tensor,
        gate: Any,
        *,
        seed: int = 1,
        processors: int = 3,
        local: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Its output, which is ``out`` if that is given.

        Raises:
            AssertionError: if the emulation found something wrong; the message says what.
        """
        self.library.emulation_begin(seed)
        given = {"x": x, "ids": ids, "weights": weights, "local": local, "out": out}
        copies = {n: self.copied(t, n) for n, t in given.items() if t is not None and t is not x}
        copies["x"] = self.copied(x, "x")
        if out is x:
            copies["out"] = copies["x"]
        of_experts = {
            field.name: self.copied(value, field.name)
            for field in dataclasses.fields(experts)
            if isinstance(value := getattr(experts, field.name), torch.Tensor)
        }

        def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            return self.allocate(torch.Size(shape).numel(), dtype, "workspace").view(shape)

        properties = SimpleNamespace(multi_processor_count=processors)
        stream = SimpleNamespace(cuda_stream=None)
        library = SimpleNamespace(
            run=lambda *spec: self.library.run(*spec) or self.library.emulation_finish(),
            error_text=self.library.error_text,
        )
        with self.patch.context() as patch:
            patch.setattr(self.kernel, "library", lambda device, form: self._of(form, library))
            patch.setattr(torch, "empty", empty)
            patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
            patch.setattr(torch.cuda, "current_stream", lambda: stream)
            patch.setattr(torch.cuda, "current_device", lambda: 0)
            patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
            try:
                found = self.kernel.run(
                    copies.pop("x"), dataclasses.replace(experts, **of_experts), copies.pop("ids"),
                    copies.pop("weights"), gate, **copies, **options,
                )  # fmt: skip
            except KernelError:
                if failure := self.library.emulation_failure().decode():
                    raise AssertionError(failure) from None
                raise
        return found.clone() if out is None else out.copy_(found)

    def _of(self, form: Form, library: Any) -> Any:
        assert form == self.form, f"{form} was asked for, and the library is for {self.form}"
        return library

    def twice(self, *args: Any, **options: Any) -> torch.Tensor:
        """What both of two orders of events give."""
        first, second = (self.run(*args, seed=seed, **options) for seed in (1, 2))
        assert torch.equal(first, second)
        return first
