"""Calibration: what a model's experts are given, gathered one decoder layer at a time.

Start at ``calibrate``. It runs the model forward (``forward``), for some roundings backward too
(``backward``), and shows each expert to a ``Quantizer``, which rounds it. This room may import
``run`` and what is below it, and not ``report``, its neighbour.
"""
