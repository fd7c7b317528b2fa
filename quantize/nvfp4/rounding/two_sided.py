"""Descent that also knows which directions of a weight's output matter.

For a difference ``D`` ``[out, in]`` between weights, K-FAC's curvature (Martens & Grosse,
arXiv 1503.05671; for rounding: YAQA, arXiv 2505.22988) says that the model's loss rises by
``trace(G D M D^T)``: ``M`` the second moments of the inputs, ``G`` those of the loss's gradient by
the outputs. With ``G`` the identity, this is what ``descent`` makes small. Now rows depend on each
other: what one loses, others can make up for. So they are improved one after another, each given
all others as they are. Several at once would overshoot: a few directions of ``G`` couple them all.
"""

from __future__ import annotations

import torch

from quantize.nvfp4.format import BLOCK, pack, unpack
from quantize.nvfp4.rounding.blocks import codes_of, values_of
from quantize.nvfp4.rounding.gptq import damped, gptq, inverse_and_factor
from quantize.nvfp4.rounding.method import Method

SWEEPS = 6
_ENOUGH = 1e-3
"""A sweep that takes a smaller share off the loss is the last one."""

DAMPING = 3e-3
"""Of the inputs' moments. More than descent's: here a row's ideal is far from its weights, and few
tokens say little about how far it may go."""
OUTPUT_DAMPING = 1e-3

_PANEL = 32
"""Rows whose pulls are computed together, by one matrix product."""


def two_sided(
    weight: torch.Tensor,
    moment: torch.Tensor,
    global_scale: torch.Tensor,
    output: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``quantize.nvfp4.rounding``; without ``output``, or if it is zero, the identity."""
    packed, block_scale = gptq(weight, moment, global_scale)
    if output is None:
        output = torch.eye(len(weight))
    # On the host, wherever the weight is: a row at a time is too little work for a GPU.
    state = TwoSided(
        (weight.float() / global_scale).cpu(),
        damped(moment.cpu(), DAMPING),
        damped(output.cpu(), OUTPUT_DAMPING),
        unpack(packed.cpu()),
        block_scale.cpu(),
    )
    left = state.loss()
    for _ in range(SWEEPS):
        gain = state.sweep()
        left -= gain
        if gain <= _ENOUGH * left:
            break
    return pack(state.codes()).to(weight.device), state.block_scale.to(weight.device)


class TwoSided:
    """A weight on its way. Everything is on the host, and losses are in units of the squared
    global scale and of the mean of ``output``'s diagonal.

    Args:
        target: float32 ``[out, in]``, in units of the global scale.
        moment: float32 ``[in, in]``, positive definite.
        output: float32 ``[out, out]``, positive definite.
        codes: uint8 ``[out, in]``, one a byte.
        block_scale: float8_e4m3fn ``[out, in / 16]``.
    """

    def __init__(
        self,
        target: torch.Tensor,
        moment: torch.Tensor,
        output: torch.Tensor,
        codes: torch.Tensor,
        block_scale: torch.Tensor,
    ) -> None:
        self.block_scale = block_scale.clone(memory_format=torch.contiguous_format)
        self._values = values_of(codes) * self._steps()
        self._target = target
        self._moment = moment.contiguous()
        # Gradients may be so small that float32 does not hold products with their squares.
        self._output = output / output.diagonal().mean()
        # What the error of each row does to the inputs' directions, float32 [out, in].
        self._pull = (target - self._values) @ moment
        self._blocks, self._inverse, self._feedback = _blocks_of(moment)

    def codes(self) -> torch.Tensor:
        """uint8 ``[out, in]``, one a byte."""
        return codes_of(self._values / self._steps())

    def loss(self) -> float:
        """``trace(G D M D^T)`` as it is now."""
        product = self._output @ self._pull
        return float((product * (self._target - self._values)).sum(dtype=torch.float64))

    def sweep(self, panel: int = _PANEL) -> float:
        """Improve every row once; returns by how much the loss fell.

        Args:
            panel: rows at a time; it makes no difference but to speed and rounding.
        """
        # Not before it is needed: numba takes a while to import.
        from quantize.nvfp4.rounding.panels import improve

        gain = 0.0
        scales = self.block_scale.view(torch.uint8)
        for first in range(0, len(self._values), panel):
            part = slice(first, first + panel)
            gain += improve(
                (self._output[part] @ self._pull).numpy(),
                self._output[part, part].contiguous().numpy(),
                self._moment.numpy(),
                self._blocks.numpy(),
                self._inverse.numpy(),
                self._feedback.numpy(),
                self._values[part].numpy(),
                scales[part].numpy(),
                self._pull[part].numpy(),
            )
        return gain

    def _steps(self) -> torch.Tensor:
        return self.block_scale.float().repeat_interleave(BLOCK, 1)


def _blocks_of(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of ``[in, in]``, float32 ``[in / 16, 16, 16]``: blocks on the diagonal, their inverses, and
    how errors are fed back in them.

    The last, from the upper Cholesky factor ``U`` of a block's inverse (see ``gptq.compensation``):
    above the diagonal, ``U[j, k] / U[j, j]``, by how much a unit of column ``j``'s error lowers
    column ``k``'s ideal; on it, ``1 / U[j, j] ** 2``, what the square of that error costs then.
    """
    count = len(moment) // BLOCK
    which = torch.arange(count)
    blocks = moment.view(count, BLOCK, count, BLOCK)[which, :, which].contiguous()
    inverse, factor = inverse_and_factor(blocks)
    diagonal = factor.diagonal(dim1=1, dim2=2)
    feedback = (factor / diagonal.unsqueeze(2)).triu(1) + torch.diag_embed(diagonal**-2)
    # LAPACK may leave columns where numba needs rows.
    return blocks, inverse.float().contiguous(), feedback.float().contiguous()


TWO_SIDED = Method(two_sided, needs_output=True)
