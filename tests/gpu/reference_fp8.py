"""What the Hopper kernel is to give with FP8 activations, in plain floats; shares no code with it.

Weights: an expert's block scales are shifted by the power of two that makes them as large as may
be, E4M3 then holding six times the largest; a weight is its magnitude times that scale, rounded to
E4M3. A scale under 2^-5 is first doubled, and its block's magnitudes halved and rounded to E2M1, as
often as it takes. Activations: a token's are divided by their largest / 448 and rounded to E4M3,
before both products; what is between these is bfloat16.
"""

from __future__ import annotations

import math

import torch

from tests.gpu.reference import GATES, MAGNITUDES, Biases, Stored, with_bias


def e4m3(values: torch.Tensor) -> torch.Tensor:
    """The nearest, ties to even, at most 448 in magnitude; float32."""
    return values.float().clamp(-448, 448).to(torch.float8_e4m3fn).float()


def rounded(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """One matrix's weights, float32 ``[rows, columns]``, of a global scale of one.

    Args:
        codes: uint8 ``[rows, columns / 2]``; scales: E4M3 ``[rows, columns / 16]``.
    """
    values = torch.tensor(MAGNITUDES, device=codes.device)
    code = torch.stack((codes, codes >> 4), -1).flatten(1)
    size, sign = values[(code & 7).int()], 1 - (code >> 3 & 1).float() * 2
    scale = scales.float()
    largest = float(scale.max())
    if largest == 0:
        return torch.zeros_like(size)
    # 464 is between 448 and what would follow it, and is rounded to 448.
    shift = math.floor(math.log2(464 / (6 * largest)))
    scale = (scale * 2.0**shift).repeat_interleave(16, 1)
    halved = torch.ones_like(size)
    while bool((low := (scale > 0) & (scale < 2.0**-5)).any()):
        scale, halved = torch.where(low, 2 * scale, scale), torch.where(low, halved / 2, halved)
    if bool((halved < 1).any()):
        apart = (size.unsqueeze(-1) * halved.unsqueeze(-1) - values).abs()
        # Of two that are as near the one of even code: an odd one is put off a little.
        code = (apart + 1e-6 * (torch.arange(8, device=codes.device) % 2)).argmin(-1)
        size = values[code]
    return sign * e4m3(size * scale) * 2.0**-shift


def quantized(x: torch.Tensor) -> torch.Tensor:
    """Tokens ``[tokens, columns]`` as FP8 keeps them, float32."""
    scale = (x.float().abs().amax(1, keepdim=True) / 448).clamp(min=1e-30)
    return e4m3(x.float() * (1 / scale)) * scale


def routed(
    x: torch.Tensor,
    w13: Stored,
    w2: Stored,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate: str,
    *,
    biases: Biases = (None, None),
) -> torch.Tensor:
    """As ``reference.routed``, in float32."""
    out = torch.zeros(x.shape, device=x.device)
    inputs = quantized(x)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)

        def product(
            rows: torch.Tensor, stored: Stored, bias: torch.Tensor | None, expert: int = expert
        ) -> torch.Tensor:
            matrix = rounded(stored.codes[expert], stored.block_scale[expert])
            found = rows @ matrix.T * stored.global_scale[expert].float()
            return with_bias(found, bias, expert)

        both = product(inputs[token], w13, biases[0])
        middle = GATES[gate](*both.chunk(2, -1)).bfloat16()
        result = product(quantized(middle), w2, biases[1]).bfloat16().float()
        out.index_add_(0, token, result * weights[token, slot].float().unsqueeze(1))
    return out
