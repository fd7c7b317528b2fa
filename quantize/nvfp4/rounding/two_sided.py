"""Descent that also knows which directions of a weight's output matter.

Let ``D`` ``[out, in]`` be the difference of two weights. This method makes ``trace(G D H D^T)``
small, where ``H`` is the Hessian of the inputs and ``G`` the Hessian of the outputs: the second
moments of the gradients of the model's loss with respect to the outputs. K-FAC (Martens & Grosse,
arXiv 1503.05671; for rounding: YAQA, arXiv 2505.22988) estimates by this form how much the model's
loss rises, if inputs and gradients are independent.

Calibration departs from K-FAC in one respect. It multiplies both an expert's inputs and its
gradients by the router's weight, so that weight counts twice, and K-FAC counts it once. A run on
m3-nano that counts it once has the same KL divergence within its error (0.00500 for 0.00493).

With ``G`` the identity, the form is what ``descent`` makes small. With any other ``G`` the rows of
a weight depend on each other: some rows can make up for what another row loses. So the method
improves one row after another, each with all other rows as they are. It does not improve several
rows at once, because that overshoots: a few directions of ``G`` couple all rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from quantize.nvfp4.format import BLOCK, pack, unpack
from quantize.nvfp4.rounding.blocks import codes_of, values_of
from quantize.nvfp4.rounding.gptq import damped, gptq, inverse_and_factor
from quantize.nvfp4.rounding.method import Job, Method, Rounded

SWEEPS = 6
_SWEEPS_TOGETHER = 8
"""On a GPU, whose order of steps takes a few sweeps more to the same loss."""
_ENOUGH = 1e-3
"""A sweep that lowers the loss by a smaller share than this is the last one."""

DAMPING = 3e-3
"""Of the inputs' Hessian. It is larger than in ``descent``: a row's ideal is far from its weights
here, and a few tokens say little about how far it may go."""
OUTPUT_DAMPING = 1e-3

_PANEL = 32
"""So many rows share one matrix product."""


def two_sided(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    global_scale: torch.Tensor,
    output_hessian: torch.Tensor | None = None,
) -> Rounded:
    """See ``quantize.nvfp4.rounding.method.Round``; an ``output_hessian`` of None or of zeros
    counts as the identity."""
    if weight.is_cuda:
        return together([Job(weight, hessian, global_scale, output_hessian)], 1)[0]
    packed, block_scale = gptq(weight, hessian, global_scale)
    if output_hessian is None:
        output_hessian = torch.eye(len(weight))
    state = TwoSided(
        weight.float() / global_scale,
        damped(hessian, DAMPING),
        damped(output_hessian, OUTPUT_DAMPING),
        unpack(packed),
        block_scale,
    )
    left = state.loss()
    for _ in range(SWEEPS):
        gain = state.sweep()
        left -= gain
        if gain <= _ENOUGH * left:
            break
    return pack(state.codes()), state.block_scale


def together(jobs: Iterable[Job], count: int) -> list[Rounded]:
    """See ``quantize.nvfp4.rounding.method.RoundTogether``.

    A GPU takes another order of steps than :class:`TwoSided`: see ``kernels.two_sided``.
    """
    from quantize.nvfp4.rounding.kernels.two_sided import Chains

    chains: Chains | None = None
    for number, (weight, hessian, global_scale, output_hessian) in enumerate(jobs):
        packed, block_scale = gptq(weight, hessian, global_scale)
        if output_hessian is None:
            output_hessian = torch.eye(len(weight), device=weight.device)
        if chains is None:
            rows, columns = weight.shape
            chains = Chains(count, rows, columns, weight.device)
        inputs = damped(hessian, DAMPING).contiguous()
        chains.start(
            number,
            weight.float() / global_scale,
            inputs,
            normed(damped(output_hessian, OUTPUT_DAMPING)),
            unpack(packed),
            block_scale,
            blocks_of(inputs),
        )
    assert chains is not None
    found: dict[int, Rounded] = {}
    for sweep in range(1, _SWEEPS_TOGETHER + 1):
        gains = chains.sweep()
        # What becomes of a weight must not depend on what is beside it: its own gain ends it.
        ends = (gains <= _ENOUGH * chains.losses) | (sweep == _SWEEPS_TOGETHER)
        for number in ends.nonzero().flatten().tolist():
            if number not in found:
                codes, block_scale = chains.result(number)
                found[number] = pack(codes), block_scale
        if len(found) == count:
            break
    return [found[number] for number in range(count)]


def normed(output_hessian: torch.Tensor) -> torch.Tensor:
    """Return the multiple with a mean diagonal of 1: gradients may be so small that float32 does
    not hold products with their squares."""
    return output_hessian / output_hessian.diagonal().mean()


class TwoSided:
    """One weight while it is being improved.

    All tensors are on the host. Losses are in units of the squared global scale and of the mean of
    ``output_hessian``'s diagonal.

    Args:
        target: float32 ``[out, in]``, in units of the global scale.
        hessian: float32 ``[in, in]``, positive definite.
        output_hessian: float32 ``[out, out]``, positive definite.
        codes: uint8 ``[out, in]``, one code a byte.
        block_scale: float8_e4m3fn ``[out, in / 16]``.
    """

    def __init__(
        self,
        target: torch.Tensor,
        hessian: torch.Tensor,
        output_hessian: torch.Tensor,
        codes: torch.Tensor,
        block_scale: torch.Tensor,
    ) -> None:
        self.block_scale = block_scale.clone(memory_format=torch.contiguous_format)
        self._values = values_of(codes) * self._steps()
        self._target = target
        self._hessian = hessian.contiguous()
        self._output_hessian = normed(output_hessian)
        # The residual of each row by itself, float32 [out, in]: minus half the derivative of
        # d H d^T, where d is the row's error.
        self._residual = (target - self._values) @ hessian
        self._blocks, self._inverse, self._feedback = blocks_of(hessian)

    def codes(self) -> torch.Tensor:
        """Return the codes as they are now, uint8 ``[out, in]``, one code a byte."""
        return codes_of(self._values / self._steps())

    def loss(self) -> float:
        """Return ``trace(G D H D^T)`` as it is now."""
        product = self._output_hessian @ self._residual
        return float((product * (self._target - self._values)).sum(dtype=torch.float64))

    def sweep(self, panel: int = _PANEL) -> float:
        """Improve every row once, and return by how much the loss fell.

        Args:
            panel: how many rows share a matrix product. Only speed and float32's own rounding
                depend on it.
        """
        # Not before it is needed: numba takes a while to import.
        from quantize.nvfp4.rounding.panels import improve

        gain = 0.0
        scales = self.block_scale.view(torch.uint8)
        for first in range(0, len(self._values), panel):
            part = slice(first, first + panel)
            gain += improve(
                (self._output_hessian[part] @ self._residual).numpy(),
                self._output_hessian[part, part].contiguous().numpy(),
                self._hessian.numpy(),
                self._blocks.numpy(),
                self._inverse.numpy(),
                self._feedback.numpy(),
                self._values[part].numpy(),
                scales[part].numpy(),
                self._residual[part].numpy(),
            )
        return gain

    def _steps(self) -> torch.Tensor:
        return self.block_scale.float().repeat_interleave(BLOCK, 1)


def blocks_of(
    hessian: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take a Hessian ``[in, in]`` apart; return three tensors, each float32 ``[in / 16, 16, 16]``.

    These are the blocks on its diagonal, their inverses, and how a block feeds errors back.

    The last follows from the upper Cholesky factor ``U`` of a block's inverse (see
    ``gptq.compensation``). Above the diagonal it is ``U[j, k] / U[j, j]``: by how much one unit of
    error in column ``j`` lowers the ideal of column ``k``. On the diagonal it is
    ``1 / U[j, j] ** 2``: what the square of that error costs then.
    """
    count = len(hessian) // BLOCK
    which = torch.arange(count, device=hessian.device)
    blocks = hessian.view(count, BLOCK, count, BLOCK)[which, :, which].contiguous()
    inverse, factor = inverse_and_factor(blocks)
    diagonal = factor.diagonal(dim1=1, dim2=2)
    feedback = (factor / diagonal.unsqueeze(2)).triu(1) + torch.diag_embed(diagonal**-2)
    # LAPACK may leave columns where numba needs rows.
    return blocks, inverse.float().contiguous(), feedback.float().contiguous()


TWO_SIDED = Method(two_sided, needs_output_hessian=True, weight_bytes=48, together=together)
