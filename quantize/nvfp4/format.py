"""The NVFP4 number format: codes, block scales, global scale. The judge of every faster path.

A weight ``[out, in]`` is stored as three things:

* ``codes``, uint8 ``[out, in / 2]``: two E2M1 values a byte, the even input in the low nibble;
* ``block_scale``, float8_e4m3fn ``[out, in / 16]``: one scale per 16 inputs;
* ``global_scale``, float32 scalar: one per tensor (shared by one expert's gate and up).

and means ``e2m1(code) * float(block_scale) * global_scale``. The global scale is ModelOpt's
``weight_scale_2``, ``amax / (6 * 448)``: with it the largest block scale is just E4M3's largest
value. compressed-tensors stores its reciprocal (see ``quantize.layouts``).

Everything here is float32 arithmetic in plain torch, on whatever device the input lives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

BLOCK = 16
"""Inputs that share one block scale."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
E4M3_MIN = 2.0**-9
"""Smallest positive (subnormal) E4M3 value; block scales never go below it, so never to zero."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of codes 0 to 7; bit 3 of a code is the sign."""

# Round to nearest, ties to the even code. A magnitude's code is the number of boundaries below it;
# a value on boundary k (between codes k and k + 1) must go to the even one of the two: up where k
# is odd, down where k is even.
_BOUNDARIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


class NvFp4(NamedTuple):
    """One quantized weight: see the module's docstring for shapes and dtypes."""

    codes: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor

    def dequantize(self) -> torch.Tensor:
        """The float32 ``[out, in]`` weight that these numbers mean."""
        return dequantize(self.codes, self.block_scale, self.global_scale)


def global_scale(*weights: torch.Tensor) -> torch.Tensor:
    """The float32 scalar global scale that ``weights`` (any shapes) can share."""
    return global_scale_of(torch.stack([w.abs().amax().float() for w in weights]).amax())


def global_scale_of(amax: torch.Tensor) -> torch.Tensor:
    """The float32 scalar global scale for weights whose largest magnitude is ``amax`` (scalar).

    ``amax / (6 * 448)``, the rule of ModelOpt's ``NVFP4QTensor``. Weights that are all zero get 1,
    since a zero scale would make NaN of them in most kernels.
    """
    # A tensor: by a plain number, PyTorch divides on GPUs through its rounded reciprocal.
    scale = amax.float() / torch.tensor(E2M1_MAX * E4M3_MAX, device=amax.device)
    # Never subnormal: it would lose digits, and its reciprocal, which compressed-tensors stores,
    # would be infinite. NaN stays NaN, for the caller to see.
    tiny = torch.finfo(torch.float32).tiny
    return torch.where(amax == 0, torch.ones_like(scale), scale.clamp_min(tiny))


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Codes (uint8, same shape) of the nearest E2M1 values, ties to even, saturating at 6."""
    magnitude = x.abs()
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    for k, boundary in enumerate(_BOUNDARIES):
        code += (magnitude >= boundary) if k % 2 else (magnitude > boundary)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest positive E4M3 values, within ``[E4M3_MIN, E4M3_MAX]`` (never zero, never NaN)."""
    return x.clamp(E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)


def encode(weight: torch.Tensor, block_scale: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Pack ``weight`` ``[out, in]`` with given scales; uint8 ``[out, in / 2]``.

    Args:
        weight: any float dtype, ``in`` a multiple of 16.
        block_scale: float8_e4m3fn ``[out, in / 16]``, positive.
        scale: float32 scalar global scale, positive.
    """
    step = (block_scale.float() * scale).unsqueeze(-1)
    blocks = weight.float().unflatten(-1, (-1, BLOCK)) / step
    return pack(round_to_e2m1(blocks).flatten(-2))


def pack(codes: torch.Tensor) -> torch.Tensor:
    """uint8 codes ``[..., n]`` (0 to 15) to bytes ``[..., n / 2]``, the even one low."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack`."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def decode(packed: torch.Tensor) -> torch.Tensor:
    """Float32 ``[..., 2 * n]`` E2M1 values of packed uint8 ``[..., n]``, without any scale."""
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=packed.device)
    table = torch.cat((values, -values))
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=-1)  # of each byte
    return pairs[packed.int()].flatten(-2)


def dequantize(
    packed: torch.Tensor, block_scale: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Float32 ``[..., in]`` from uint8 ``[..., in / 2]``, e4m3 ``[..., in / 16]``, float32 scalar.

    With a leading dimension (experts), ``scale`` must broadcast against ``block_scale``.
    """
    step = block_scale.float() * scale
    return (decode(packed).unflatten(-1, (-1, BLOCK)) * step.unsqueeze(-1)).flatten(-2)


def bad_scales(scales: torch.Tensor) -> str | None:
    """What is wrong with scales of any kind, shape and float dtype; None if nothing.

    Good ones are positive and finite; this module makes no others.
    """
    if scales.dtype == torch.float8_e4m3fn and scales.numel():
        # As signed bytes: 1 to 126 are good, 127 is NaN, 0 and those below are zero or negative.
        # Large models have 10^10 of them, and this takes a hundredth of the time of the rest (of
        # torch.aminmax, a tenth).
        signed = scales.view(torch.int8)
        if signed.min() > 0 and signed.max() < 127:
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
