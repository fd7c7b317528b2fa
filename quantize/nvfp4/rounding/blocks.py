"""The scale and the codes of one block, for methods that go through a weight column by column."""

from __future__ import annotations

from functools import cache

import torch

from quantize.nvfp4.format import E2M1_MAX, E2M1_VALUES, round_to_e4m3
from quantize.nvfp4.scales.mse import HIGHEST, LOWEST

_OFFSETS = (0, *(k for k in range(-8, 9) if k))
"""Of the candidates' bits. The present scale comes first, so that it wins ties. Where columns count
differently, the bounds of the ``mse`` rule do not hold."""


def codes_of(x: torch.Tensor) -> torch.Tensor:
    """Round to E2M1 as ``nvfp4.format.round_to_e2m1`` does; faster where ``x`` is one column.

    Args:
        x: float32, of any shape.

    Returns:
        uint8 codes, one a byte, in the same shape.
    """
    # A tie that goes down belongs to the code below: the code above begins at the next number.
    size = torch.bucketize(x.abs(), _tables(x.device)[1], right=True, out_int32=True)
    return size.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


def values_of(codes: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of uint8 codes, one code a byte, of any shape."""
    return _tables(codes.device)[0][codes.int()]


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the values of the 16 codes, and the least float32 magnitudes of codes 1 to 7."""
    values = torch.tensor(E2M1_VALUES)
    middle = (values[1:] + values[:-1]) / 2
    odd = torch.arange(len(middle)) % 2 == 1  # a tie goes to the even code: up from an odd one
    least = torch.where(odd, middle, torch.nextafter(middle, torch.tensor(torch.inf)))
    return torch.cat((values, -values)).to(device), least.to(device)


def best_scale(block: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Choose for each row the block scale with the least weighted squared error.

    The candidates are the ``max`` rule's scale and its :func:`neighbours`.

    Args:
        block: float32 ``[out, 16]``, in units of the global scale.
        importance: float32 ``[16]``: the weight of each column's squared error.

    Returns:
        float32 ``[out]``, E4M3 values.
    """
    scales = neighbours(round_to_e4m3(block.abs().amax(1) / E2M1_MAX))
    step = scales.unsqueeze(-1)
    nearest = values_of(codes_of(block.unsqueeze(1) / step)) * step
    error = ((block.unsqueeze(1) - nearest).square() * importance).sum(-1)
    return scales.gather(1, error.argmin(1, keepdim=True)).squeeze(1)


def neighbours(scale: torch.Tensor) -> torch.Tensor:
    """Return each scale with its eight E4M3 neighbours on either side.

    Args:
        scale: float32 ``[out]``, E4M3 values.

    Returns:
        float32 ``[out, 17]``.
    """
    bits = scale.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16).unsqueeze(1)
    offsets = torch.tensor(_OFFSETS, dtype=torch.int16, device=scale.device)
    near = (bits + offsets).clamp(LOWEST, HIGHEST).to(torch.uint8)
    return near.view(torch.float8_e4m3fn).float()
