"""``nvfp4-moe evaluate``: what a quantized checkpoint lost, on a text.

:func:`evaluate` is the whole of it, for tokens that :func:`tokens_of` makes. Rooms: ``side`` (one
of the two checkpoints, as a model that is run a layer at a time), ``agreement`` (whether they are
versions of one model), ``activations`` (what kernels round), ``depth`` and ``predictions`` (the
figures), ``work`` (where states lie, and how far a run has come), ``result`` (what comes out).
"""

from quantize.evaluate.agreement import tokens_of
from quantize.evaluate.evaluate import evaluate
from quantize.evaluate.result import Result

__all__ = ["Result", "evaluate", "tokens_of"]
