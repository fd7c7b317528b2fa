"""``headroom``: small blocks decide. They get block scales well within E4M3, and what is left of
E4M3 above them is room for inputs larger than any that was seen.

It is ModelOpt's rule, with its numbers (nvidia-modelopt 0.47.0, the algorithm
``nvfp4_act_headroom``, in ``torch/quantization/calib/nvfp4_act_headroom.py``)::

    amax = max(rho * anchor, upper)
    input_scale = amax / (6 * 448)

``anchor`` is the 1st percentile of the blocks' largest magnitudes, without those below
``upper / 1e6``, and ``upper`` the 99.99th. So a block of the anchor's size has a block scale of
``448 / rho``, two steps above the least that E4M3 has in full precision; and if blocks differ by
more than ``rho``, the largest of 10,000 are clipped, for the sake of all others.

Percentiles are those of a histogram with eight bins an octave, ModelOpt's of one with 6.4.
"""

from __future__ import annotations

from quantize.nvfp4.format import E2M1_MAX, E4M3_MAX
from quantize.nvfp4.input_scales.magnitudes import Magnitudes

RHO = 16384.0
ANCHOR, UPPER = 1.0, 99.99
"""Percentiles."""
LEAST = 1e-6
"""Of ``upper``: smaller blocks say nothing."""


def headroom_scale(magnitudes: Magnitudes) -> float:
    """See the module's docstring."""
    upper = magnitudes.percentile(UPPER)
    anchor = magnitudes.percentile(ANCHOR, above=LEAST * upper)
    return max(RHO * anchor, upper) / (E2M1_MAX * E4M3_MAX) if upper > 0 else 1.0
