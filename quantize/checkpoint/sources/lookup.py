"""Converting codes to float32 with lookup tables.

On CPUs this is several times faster than PyTorch's own conversions. A table has one row for each
value of a byte, so one lookup gives both FP4 values of a byte. Every function here works on the
device of its codes.
"""

from __future__ import annotations

import torch

from quantize.nvfp4.format import E2M1_VALUES, unpack

_CHUNK = 1 << 18  # codes at a time: their int32 indices (4 bytes each) must stay in the CPU's cache
_BYTES = torch.arange(256, dtype=torch.uint8)
_E2M1 = E2M1_VALUES + tuple(-value for value in E2M1_VALUES)

E4M3 = _BYTES.view(torch.float8_e4m3fn).float()[:, None]
"""float32 ``[256, 1]``; codes 0x7F and 0xFF are NaN."""

E8M0 = _BYTES.view(torch.float8_e8m0fnu).float()[:, None]
"""float32 ``[256, 1]``: ``2 ** (code - 127)``; 255 is NaN. Source: OCP Microscaling Formats 1.0."""

E2M1_PAIRS = torch.tensor(_E2M1)[unpack(_BYTES[:, None]).int()]
"""float32 ``[256, 2]``: the value of the low nibble, then that of the high nibble."""


INTEGERS = {
    4: torch.stack(((_BYTES & 15).float(), (_BYTES >> 4).float()), -1) - 8,
    8: _BYTES.float()[:, None] - 128,
}
"""By number of bits: float32 ``[256, 2]`` or ``[256, 1]``, the signed integers that a byte holds,
each stored plus ``2 ** (bits - 1)``, the low nibble first."""


def lookup(
    codes: torch.Tensor, table: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Replace each code by its row of the table.

    Args:
        codes: ``[..., n]``, of a dtype of one byte.
        table: float32 ``[256, k]``, ``k`` 1 or 2.
        out: memory for the result: float32 with as many values; None to allocate it.

    Returns:
        float32 ``[..., n * k]``.
    """
    width = table.shape[1]
    flat = codes.contiguous().view(torch.uint8).view(-1)
    if out is None:
        out = torch.empty(len(flat) * width, device=codes.device)
    # Rows are copied as integers: two floats read as one double might be a NaN, which a copy can
    # change.
    whole = {1: torch.int32, 2: torch.int64}[width]
    rows, column = out.view(-1).view(whole), table.to(codes.device).view(whole).view(-1)
    step = _CHUNK if codes.device.type == "cpu" else max(len(flat), 1)
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        torch.index_select(column, 0, flat[part].int(), out=rows[part])
    return out.view(*codes.shape[:-1], codes.shape[-1] * width)


def scale_values(scale: torch.Tensor) -> torch.Tensor:
    """Scales of any stored dtype as float32 of the same shape; dtypes of one byte are E8M0."""
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return lookup(scale, E8M0) if scale.dim() else lookup(scale.view(1), E8M0).view(())
    return scale.float()
