"""``nvfp4_moe_report.html``: what a run did, for eyes. One file, no network, no clock.

``render(RunReport(...))`` is the whole interface. The page depends on nothing but its argument, so
that a resumed run leaves the same bytes as one that was never interrupted.
"""

from quantize.report.data import CalibrationReport, Experience, LayerReport, RunReport
from quantize.report.page import render

__all__ = ["CalibrationReport", "Experience", "LayerReport", "RunReport", "render"]
