"""``unbiased``: the ``mse`` rule, and then the global scale that does not shrink the weight.

The result ``Q`` with the least squared error is shorter than the weight ``W``: were
``sum(Q W) > sum(Q Q)``, a larger scale would be nearer. So ``sum(Q W)`` is below ``sum(W W)`` by
just the squared error, 0.66 % where weights are like random numbers. Rounding errors point
everywhere, and average out over many inputs, weights and layers. The shrinking does not: all
experts' outputs become smaller by 0.66 % in each of their two products, in all layers alike.

So the global scale is multiplied by ``sum(W W) / sum(Q W)``, with codes and block scales as they
are. That adds 0.7 % to the squared error, which is 0.66 % of the weight's squares, and takes away
all that is systematic in it.
"""

from __future__ import annotations

from dataclasses import replace

from quantize.nvfp4.scales.mse import MSE

UNBIASED = replace(MSE, unbiased=True)
