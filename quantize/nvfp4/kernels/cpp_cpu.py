"""The kernel for CPUs, in C++ (``encode.cpp``). It gives the same bits as the reference kernel.

It is compiled at first use. Threads can quantize different weights at once: ctypes releases
Python's global interpreter lock. What is not its work, numba's kernel does: comparing with stored
weights, other dtypes, rules without ``reach``, and rows that are no whole number of blocks.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from quantize.native import jit
from quantize.native.processor import AVX2, AVX512, Instructions
from quantize.nvfp4.format import BLOCK, NvFp4
from quantize.nvfp4.kernels.kernel import Kernel, Quantized
from quantize.nvfp4.scales.rule import Reach, ScaleRule

INSTRUCTIONS = (AVX512, AVX2)
"""Those it can be compiled for, the fastest first."""

_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
"""Mirrors ``Kind`` in encode.cpp."""


def source(instructions: Instructions) -> tuple[str, jit.Language]:
    """What is compiled for ``instructions``, and how."""
    text = Path(__file__).with_name("encode.cpp").read_text()
    # Not fused: each operation rounds as the reference's does.
    return text, jit.cpp(*instructions.options, "-ffp-contract=off", "-Wno-psabi")


class CppKernel:
    """See ``quantize.nvfp4.kernels.kernel.Kernel``.

    Args:
        instructions: one of :data:`INSTRUCTIONS` that this host has.

    Raises:
        KernelError: if it cannot be compiled or loaded here.
    """

    def __init__(self, instructions: Instructions) -> None:
        self._library = jit.load(*source(instructions))
        self._library.amax.restype = ctypes.c_float

    @property
    def _other(self) -> Kernel:
        # Here and not above: most runs need no numba, which takes a second to import.
        from quantize.nvfp4.kernels.numba_cpu import NumbaKernel

        return NumbaKernel()

    def amax(self, weight: torch.Tensor) -> torch.Tensor:
        if not _takes(weight):
            return self._other.amax(weight)
        weight = weight.contiguous()
        return torch.tensor(float(self._library.amax(*_source(weight))))

    def encode(
        self, weight: torch.Tensor, global_scale: torch.Tensor, rule: ScaleRule
    ) -> Quantized:
        if rule.reach is None or not _takes(weight):
            return self._other.encode(weight, global_scale, rule)
        rows, columns = weight.shape
        weight = weight.contiguous()
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
        block_scale = torch.empty(rows, columns // BLOCK, dtype=torch.uint8)
        counts = torch.zeros(127, dtype=torch.int64)
        sums = torch.zeros(2, dtype=torch.float64)
        searched = None if rule.reach == Reach() else (ctypes.c_int64 * 3)(*rule.reach)
        scale = float(global_scale)
        made = (codes, block_scale, counts, sums)
        self._library.encode(
            *_source(weight),
            ctypes.c_float(scale),
            searched,
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in made),
        )
        noise, signal = (float(each) * scale * scale for each in sums)
        stored = NvFp4(codes, block_scale.view(torch.float8_e4m3fn), global_scale)
        return Quantized(stored, noise, signal, counts)

    def compare(self, weight: torch.Tensor, stored: NvFp4) -> tuple[float, float]:
        return self._other.compare(weight, stored)

    def products(self, weight: torch.Tensor, stored: NvFp4) -> tuple[float, float]:
        return self._other.products(weight, stored)


def _takes(weight: torch.Tensor) -> bool:
    return weight.dtype in _KINDS and weight.shape[-1] % BLOCK == 0


def _source(weight: torch.Tensor) -> tuple[ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]:
    """Where a weight lies, its dtype, and its number of blocks."""
    return (
        ctypes.c_void_p(weight.data_ptr()),
        ctypes.c_int64(_KINDS[weight.dtype]),
        ctypes.c_int64(weight.numel() // BLOCK),
    )
