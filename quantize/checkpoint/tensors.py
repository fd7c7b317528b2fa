"""One tensor of a checkpoint: its name, dtype, shape and place in a file; and the known dtypes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch

BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element, by safetensors' name of the dtype."""


DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16, "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16,
    "U32": torch.uint32, "I32": torch.int32, "F32": torch.float32,
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64,
}  # fmt: skip
"""PyTorch's dtype, by safetensors' name of it."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""safetensors' name of a dtype, by PyTorch's dtype."""

PLAIN = ("BF16", "F16", "F32")
"""Dtypes that can be quantized, by safetensors' names."""


class TensorInfo(NamedTuple):
    """One tensor's entry in a safetensors header, either read or to be written.

    Attributes:
        name: the tensor's name.
        dtype: safetensors' name of its dtype, a key of ``BYTES``.
        shape: its shape.
        file: the file that holds it; the empty path if it is still to be written.
        offset: offset in bytes of its data within ``file``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path = Path()
    offset: int = 0

    @property
    def nbytes(self) -> int:
        """Size of its data in bytes."""
        return math.prod(self.shape) * BYTES[self.dtype]
