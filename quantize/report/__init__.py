"""What a run did: data (``nvfp4_moe_report.json``), and a page for eyes that is made from it.

The page is one file that needs no network. It depends on nothing but the data, and the data on
nothing but the run: no clock and no host, so that a resumed run leaves the same bytes as one that
was never interrupted. This room may import ``run`` and what is below it, and not
``calibration``, its neighbour.
"""

from quantize.report.data import (
    BaseReport,
    BitsReport,
    CalibrationReport,
    ExpertStats,
    LayerReport,
    RunReport,
    dumps,
    loads,
)
from quantize.report.page import render

__all__ = [
    "BaseReport",
    "BitsReport",
    "CalibrationReport",
    "ExpertStats",
    "LayerReport",
    "RunReport",
    "dumps",
    "loads",
    "render",
]
