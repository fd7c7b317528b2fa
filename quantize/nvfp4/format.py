"""The NVFP4 number format: codes, block scales and global scale.

A weight ``[out, in]`` is stored as three tensors:

* ``codes``, uint8 ``[out, in / 2]``: two E2M1 values per byte, the even input in the low nibble;
* ``block_scale``, float8_e4m3fn ``[out, in / 16]``: one scale for each 16 inputs;
* ``global_scale``, float32 scalar: one per tensor (one expert's gate and up share one).

The weight's value is ``e2m1(code) * float(block_scale) * global_scale``. The global scale is
ModelOpt's ``weight_scale_2``, which is ``amax / (6 * 448)``. With it the largest block scale is
exactly the largest value of E4M3. compressed-tensors stores the reciprocal (see
``quantize.layouts``).

Everything here is float32 arithmetic in plain PyTorch, on the device of the input. It is the
reference for all faster code, which must give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 16
"""Number of inputs that share one block scale."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9
"""The smallest positive (subnormal) E4M3 value. No block scale is smaller, so none is zero."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of codes 0 to 7. Bit 3 of a code is the sign."""

IMPLAUSIBLE = 0.5
"""Relative error above which a weight cannot be the one that was quantized: NVFP4 loses about 0.1
of a weight's norm."""

# Boundaries for rounding to nearest, ties to the even code. The code of a magnitude is the number
# of boundaries below it. A value on boundary k lies between codes k and k + 1 and must get the even
# one of the two, so it is rounded up if k is odd, and down if k is even.
_BOUNDARIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


class NvFp4(NamedTuple):
    """One quantized weight. The module's docstring has the shapes and dtypes."""

    codes: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The dequantized weight, float32 ``[out, in]``."""
        return dequantize(self.codes, self.block_scale, self.global_scale)


def global_scale(*weights: torch.Tensor) -> torch.Tensor:
    """One global scale (float32 scalar) for all ``weights`` together, of any shapes."""
    return global_scale_of(torch.stack([w.abs().amax().float() for w in weights]).amax())


def global_scale_of(amax: torch.Tensor) -> torch.Tensor:
    """The global scale (float32 scalar) of weights with largest magnitude ``amax`` (scalar).

    It is ``amax / (6 * 448)``, the rule of ModelOpt's ``NVFP4QTensor``. Weights that are all zero
    get 1, since most kernels would turn them into NaN with a zero scale.
    """
    # The divisor is a tensor because PyTorch divides by a plain number on GPUs by multiplying with
    # its rounded reciprocal.
    scale = amax.float() / torch.tensor(E2M1_MAX * E4M3_MAX, device=amax.device)
    # A subnormal scale would lose digits, and its reciprocal, which compressed-tensors stores,
    # would be infinite. NaN stays NaN, so that the caller sees it.
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(amax == 0, torch.ones_like(scale), scale.clamp_min(tiny))


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Codes (uint8, same shape) of the nearest E2M1 values, ties to even, magnitude at most 6."""
    magnitude = x.abs()
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    for k, boundary in enumerate(_BOUNDARIES):
        code += (magnitude >= boundary) if k % 2 else (magnitude > boundary)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest E4M3 values within ``[E4M3_MIN, E4M3_MAX]``, so never zero and never NaN."""
    return x.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)


def encode(weight: torch.Tensor, block_scale: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Quantize ``weight`` ``[out, in]`` with given scales to packed codes, uint8 ``[out, in / 2]``.

    Args:
        weight: any float dtype, ``in`` a multiple of 16.
        block_scale: float8_e4m3fn ``[out, in / 16]``, positive.
        scale: float32 scalar global scale, positive.
    """
    step = (block_scale.float() * scale).unsqueeze(-1)
    blocks = weight.float().unflatten(-1, (-1, BLOCK)) / step
    return pack(round_to_e2m1(blocks).flatten(-2))


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack uint8 codes ``[..., n]`` (0 to 15) into bytes ``[..., n / 2]``, the even one low."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Unpack bytes ``[..., n / 2]`` to uint8 codes ``[..., n]``: the inverse of :func:`pack`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode(packed: torch.Tensor) -> torch.Tensor:
    """The E2M1 values, float32 ``[..., 2 * n]``, of packed uint8 ``[..., n]``; no scale applied."""
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=packed.device)
    table = torch.cat((values, -values))
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=-1)  # by byte
    return pairs[packed.int()].flatten(-2)


def dequantize(
    packed: torch.Tensor, block_scale: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Dequantize to float32 ``[..., in]``.

    Args:
        packed: uint8 ``[..., in / 2]``.
        block_scale: float8_e4m3fn ``[..., in / 16]``.
        scale: float32 scalar global scale. With a leading dimension of experts, it must broadcast
            against ``block_scale``.
    """
    step = block_scale.float() * scale
    return (decode(packed).unflatten(-1, (-1, BLOCK)) * step.unsqueeze(-1)).flatten(-2)


def bad_scales(scales: torch.Tensor) -> str | None:
    """A description of what is wrong with scales; None if they are positive and finite.

    They may be block or global scales, of any shape and float dtype. All scales that this module
    makes are good.
    """
    if scales.dtype == torch.float8_e4m3fn and scales.numel():
        # A fast check. As signed bytes, 1 to 126 are good, 127 is NaN, and 0 and below are zero or
        # negative. Large models have 10^10 scales, and this takes a hundredth of the time of the
        # code below (and a tenth of the time of torch.aminmax). By NumPy on CPUs: PyTorch shares a
        # minimum out among threads, which on busy machines wait for each other far longer.
        signed = scales.detach().view(torch.int8)
        bytes_ = signed if signed.is_cuda else signed.numpy()
        if bytes_.min() > 0 and bytes_.max() < 127:
            return None
    values = scales.float()
    for bad, what in (
        (values.isnan(), "NaN"),
        (values.isinf(), "infinite"),
        (values == 0, "zero"),
        (values < 0, "negative"),
    ):
        if bad.any():
            return f"{int(bad.sum())} of {values.numel()} scales are {what}"
    return None
