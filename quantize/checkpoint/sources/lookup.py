"""Codes to float32 through tables: several times faster on CPUs than PyTorch's conversions.

A table has one row a byte, so that FP4 gives both values of a byte at once. All work on whatever
device the codes are on.
"""

from __future__ import annotations

import torch

from quantize.nvfp4.format import E2M1_VALUES, unpack

_CHUNK = 1 << 18  # indices are four times the codes' size: on CPUs they must stay in cache
_BYTES = torch.arange(256, dtype=torch.uint8)
_E2M1 = E2M1_VALUES + tuple(-value for value in E2M1_VALUES)

E4M3 = _BYTES.view(torch.float8_e4m3fn).float()[:, None]
"""``[256, 1]``; codes 0x7F and 0xFF are NaN."""

E8M0 = _BYTES.view(torch.float8_e8m0fnu).float()[:, None]
"""``[256, 1]``: ``2 ** (code - 127)``, and NaN for 255. Source: OCP Microscaling Formats 1.0."""

E2M1_PAIRS = torch.tensor(_E2M1)[unpack(_BYTES[:, None]).int()]
"""``[256, 2]``: the value of the low nibble, then that of the high one."""


def lookup(
    codes: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Float32 ``[..., n * k]`` from codes ``[..., n]``, one byte each, and a table ``[256, k]``.

    Args:
        out: memory for the result, float32, as many values; else it is new.
    """
    width = table.shape[1]
    flat = codes.contiguous().view(torch.uint8).view(-1)
    if out is None:
        out = torch.empty(len(flat) * width, device=codes.device)
    # As integers, since a pair of floats read as one double might be a NaN that changes in a copy.
    whole = {1: torch.int32, 2: torch.int64}[width]
    rows, column = out.view(-1).view(whole), table.to(codes.device).view(whole).view(-1)
    step = _CHUNK if codes.device.type == "cpu" else max(len(flat), 1)
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        torch.index_select(column, 0, flat[part].int(), out=rows[part])
    return out.view(*codes.shape[:-1], codes.shape[-1] * width)


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Scales of any stored dtype as float32; bytes are E8M0."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return lookup(scale, E8M0) if scale.dim() else lookup(scale.view(1), E8M0).view(())
    return scale.float()
