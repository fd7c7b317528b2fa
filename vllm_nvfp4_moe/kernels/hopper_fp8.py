"""Routed NVFP4 experts on Hopper, activations in FP8: the Python side of ``hopper_fp8.cu``.

Faster than :mod:`hopper_moe` where there is much to multiply, and less exact: before both GEMMs
activations are rounded to E4M3, with a scale for each token, and weights are rounded to E4M3 as
:mod:`hopper_fp8_weights` says.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from quantize.gates import Gate
from vllm_nvfp4_moe.kernels import hopper_fp8_weights, hopper_moe, hopper_weights

UNITS = {"some": (8, 64), "many": (16, 128), "more": (16, 192), "most": (16, 256)}
"""Kernels by what they are for: sizes of tiles of tokens, and the largest."""
KINDS = tuple(UNITS)


class Experts(hopper_moe.Experts):
    """As ``hopper_moe.Experts``, but of :func:`hopper_fp8_weights.pack_experts`; global scales are
    times what that says."""

    @staticmethod
    def matrix(
        codes: torch.Tensor, scales: torch.Tensor, global_scales: torch.Tensor, gated: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``hopper_moe.Experts.matrix``."""
        packed, factors = hopper_fp8_weights.pack_experts(codes, scales, gated)
        return packed, global_scales.float() * factors


class _Layer(ctypes.Structure):
    """As ``Layer`` in hopper_fp8.cu."""

    _fields_ = hopper_moe.layer_fields(
        "rows1", "middle", "rows2", "parts", "scales1", "scales2", "tiles", "sorts", "places"
    )


def source() -> str:
    """The whole of the CUDA source."""
    return hopper_moe.whole(Path(__file__).with_suffix(".cu"), UNITS, "e4m3", 32)


@functools.cache
def library(device: int) -> ctypes.CDLL:
    """The compiled kernels, ready for the CUDA device of this number.

    Raises:
        KernelError: if they cannot be built, or not on this device.
    """
    return hopper_moe.prepared(source(), _Layer, device)


def kind(pairs: float, experts: int) -> str:
    """Which of :data:`KINDS` is for a batch of so many ``pairs`` of a token and an expert, as
    measured (docs/kernel-notes.md)."""
    each = pairs / experts
    if each <= 48:
        return "some"
    if each <= 112:
        return "many"
    return "most" if 160 < each <= 384 else "more"


def run(
    x: torch.Tensor,
    experts: Experts,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: Gate,
    *,
    local: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    use: str | None = None,
) -> torch.Tensor:
    """The routed experts' sum for each token; arguments and errors as of :func:`hopper_moe.run`.

    Args:
        use: of :data:`KINDS`, instead of what :func:`kind` says.
    """
    hopper_moe.check_arguments(x, experts, ids, weights, local, out)
    count = experts.w13.shape[0]
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    use = use or kind(hopper_moe.expected_pairs(ids, count, local), count)

    def workspace(rows: int, hidden: int, intermediate: int) -> tuple[torch.Tensor, ...]:
        def empty(size: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=x.device)

        # FP8 in its first half, then each row's output in bf16.
        rows1 = empty(rows * hidden, torch.bfloat16)
        middle = empty(rows * intermediate, torch.bfloat16)
        rows2 = empty(rows * intermediate, torch.float8_e4m3fn)
        scales1, scales2 = empty(rows, torch.float32), empty(rows, torch.float32)
        return rows1, middle, rows2, rows1, scales1, scales2

    return hopper_moe.launch(
        x, experts, ids, weights, gate, local, out,
        _Layer, library, UNITS, use, processors, hopper_weights.COLUMNS, workspace,
    )  # fmt: skip
