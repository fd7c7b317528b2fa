"""Coordinate descent from GPTQ's result, until no single column and no single block improves it.

GPTQ never goes back: it rounds a column while the columns after it are still exact. The descent
gives each column in turn the codes that are best with all other columns as they are. Then it tries
other scales for each block, with codes that fit them, and keeps what is better. No step makes the
loss larger, and a few sweeps take a fifth off GPTQ's loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from quantize.nvfp4.format import BLOCK, pack, unpack
from quantize.nvfp4.rounding.blocks import codes_of, neighbours, values_of
from quantize.nvfp4.rounding.gptq import damped, gptq
from quantize.nvfp4.rounding.method import Method

if TYPE_CHECKING:
    from quantize.nvfp4.rounding.kernels import descent as on_gpu

SWEEPS = 3
_DAMPING = 1e-4
"""Only makes divisions possible: unlike GPTQ's errors, the errors here do not add up."""


def descent(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    global_scale: torch.Tensor,
    output_hessian: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See ``quantize.nvfp4.rounding.method.Round``; ``output_hessian`` makes no difference."""
    packed, block_scale = gptq(weight, hessian, global_scale)
    state = _descent_on(weight.device)(
        weight.float() / global_scale,
        damped(hessian, _DAMPING),
        unpack(packed),
        block_scale.float(),
    )
    for _ in range(SWEEPS):
        state.columns()
        state.blocks()
    state.columns()
    return pack(state.codes), state.scales.to(torch.float8_e4m3fn)


def _descent_on(device: torch.device) -> type[Descent] | type[on_gpu.Descent]:
    if device.type == "cuda":
        from quantize.nvfp4.rounding.kernels import descent as on_gpu

        return on_gpu.Descent
    return Descent


class Descent:
    """One weight while it is being improved.

    Args:
        target: float32 ``[out, in]``, in units of the global scale.
        hessian: float32 ``[in, in]``, positive definite.
        codes: uint8 ``[out, in]``, one code a byte; changed in place.
        scales: float32 ``[out, in / 16]``, E4M3 values; changed in place.
    """

    def __init__(
        self,
        target: torch.Tensor,
        hessian: torch.Tensor,
        codes: torch.Tensor,
        scales: torch.Tensor,
    ) -> None:
        self.codes = codes
        self.scales = scales
        self._hessian = hessian
        self._values = values_of(codes) * scales.repeat_interleave(BLOCK, 1)
        # The residual: minus half the derivative of the loss with respect to each value.
        self._residual = (target - self._values) @ hessian

    def columns(self) -> None:
        """Give every column in turn its best codes."""
        for block in range(self.scales.shape[1]):
            scale = self.scales[:, block]
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            hessian, values = self._hessian[part, part], self._values[:, part].clone()
            residual = self._residual[:, part].clone()
            for k in range(BLOCK):
                code = codes_of((values[:, k] + residual[:, k] / hessian[k, k]) / scale)
                value = values_of(code) * scale
                residual -= torch.outer(value - values[:, k], hessian[k])
                values[:, k] = value
                self.codes[:, block * BLOCK + k] = code
            self._set(part, values)

    def blocks(self) -> None:
        """Give every block in turn another scale, and codes that fit it, where that is better."""
        for block in range(self.scales.shape[1]):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            hessian = self._hessian[part, part]
            # What would be best for the block, with all other blocks as they are.
            step = torch.linalg.solve(hessian, self._residual[:, part].T).T
            ideal = self._values[:, part] + step
            scales = neighbours(self.scales[:, block])
            codes, values = _rounded(ideal, scales, hessian)
            errors = _quadratic(ideal.unsqueeze(1) - values, hessian)
            before = _quadratic(ideal - self._values[:, part], hessian)
            least, which = errors.min(1)
            better = torch.arange(len(ideal), device=ideal.device)[least < before]
            which = which[better]
            self.scales[better, block] = scales[better, which]
            self.codes[better, part] = codes[better, which]
            found = self._values[:, part].clone()
            found[better] = values[better, which]
            self._set(part, found)

    def _set(self, part: slice, values: torch.Tensor) -> None:
        """Set some columns' values, and bring the residual up to date."""
        self._residual -= (values - self._values[:, part]) @ self._hessian[part]
        self._values[:, part] = values


def _rounded(
    ideal: torch.Tensor, scales: torch.Tensor, hessian: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row of a block with each candidate scale: to nearest, then improve each column
    once.

    Args:
        ideal: ``[out, 16]``.
        scales: ``[out, candidates]``.
        hessian: ``[16, 16]``.

    Returns:
        codes and their values, both ``[out, candidates, 16]``.
    """
    step = scales.unsqueeze(-1)
    codes = codes_of(ideal.unsqueeze(1) / step)
    values = values_of(codes) * step
    residual = (ideal.unsqueeze(1) - values) @ hessian
    for k in range(BLOCK):
        codes[..., k] = codes_of((values[..., k] + residual[..., k] / hessian[k, k]) / scales)
        value = values_of(codes[..., k]) * scales
        residual -= (value - values[..., k]).unsqueeze(-1) * hessian[k]
        values[..., k] = value
    return codes, values


def _quadratic(difference: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return ((difference @ hessian) * difference).sum(-1)


DESCENT = Method(descent)
