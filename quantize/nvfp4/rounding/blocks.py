"""One block's scale and codes at a time, for methods that go through a weight by columns."""

from __future__ import annotations

from functools import cache

import torch

from quantize.nvfp4.format import E2M1_MAX, E2M1_VALUES, round_to_e4m3
from quantize.nvfp4.scales.mse import HIGHEST, LOWEST, OFFSETS


def codes_of(x: torch.Tensor) -> torch.Tensor:
    """``nvfp4.round_to_e2m1``, faster where ``x`` is as small as a column."""
    # What lies on a boundary below which ties go down counts only from the next number on.
    size = torch.bucketize(x.abs(), _tables(x.device)[1], right=True, out_int32=True)
    return size.to(torch.uint8) | (torch.signbit(x).to(torch.uint8) << 3)


def values_of(codes: torch.Tensor) -> torch.Tensor:
    """Float32 values of uint8 codes, of any shape: one a byte, not packed."""
    return _tables(codes.device)[0][codes.int()]


@cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the 16 codes; the least float32 magnitudes of codes 1 to 7."""
    values = torch.tensor(E2M1_VALUES)
    middle = (values[1:] + values[:-1]) / 2
    odd = torch.arange(len(middle)) % 2 == 1  # a tie goes to the even code: up from an odd one
    least = torch.where(odd, middle, torch.nextafter(middle, torch.tensor(torch.inf)))
    return torch.cat((values, -values)).to(device), least.to(device)


def best_scale(block: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Float32 ``[out]``, E4M3 values: for each row the scale with the least weighted error.

    Those tried are the ``mse`` rule's (``quantize.nvfp4.scales.mse``).

    Args:
        block: float32 ``[out, 16]``, in units of the global scale.
        importance: of each column's squared error, float32 ``[16]``.
    """
    scales = around(round_to_e4m3(block.abs().amax(1) / E2M1_MAX))
    step = scales.unsqueeze(-1)
    nearest = values_of(codes_of(block.unsqueeze(1) / step)) * step
    error = ((block.unsqueeze(1) - nearest).square() * importance).sum(-1)
    return scales.gather(1, error.argmin(1, keepdim=True)).squeeze(1)


def around(scale: torch.Tensor) -> torch.Tensor:
    """Float32 ``[out, 17]``: ``scale`` (E4M3 values ``[out]``), and eight to each side of it."""
    bits = scale.to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16).unsqueeze(1)
    offsets = torch.tensor(OFFSETS, dtype=torch.int16, device=scale.device)
    near = (bits + offsets).clamp(LOWEST, HIGHEST).to(torch.uint8)
    return near.view(torch.float8_e4m3fn).float()
