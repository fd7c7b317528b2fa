"""What a user decides about calibration."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Calibration:
    """See ``--calibrate`` and the options beside it.

    Attributes:
        text: where the text is from, as the user said it.
        rows: of tokens; length: of each.
        digest: of the tokens themselves.
        method: a key of ``quantize.rounding.METHODS``.
        every_expert: experts are calibrated with all tokens, not only those routed to them.
    """

    text: str
    rows: int
    length: int
    digest: str
    method: str = "descent"
    every_expert: bool = False


def digest_of(tokens: torch.Tensor) -> str:
    """Equal only for equal tokens, int64 ``[rows, length]``."""
    return hashlib.sha256(tokens.contiguous().numpy().tobytes()).hexdigest()
