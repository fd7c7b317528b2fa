"""Experts in plain floats, from the stored 4-bit weights; shares no code with the package or vLLM.

The formats are from their definitions: E2M1 (OCP MX 1.0: a sign and 0, .5, 1, 1.5, 2, 3, 4, 6), two
to a byte, the low half first; an E4M3 scale for each 16; a float32 scale for the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import silu

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

GateFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Stored(NamedTuple):
    """The quantized matrices of all experts.

    Attributes:
        codes: uint8 ``[experts, out, in / 2]``.
        block_scale: float8_e4m3fn ``[experts, out, in / 16]``.
        global_scale: float32 ``[experts]``, as it multiplies.
    """

    codes: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor

    def weight(self, expert: int, dtype: torch.dtype) -> torch.Tensor:
        """One expert's matrix ``[out, in]``."""
        values = torch.tensor(MAGNITUDES, dtype=dtype, device=self.codes.device)
        values = torch.cat((values, -values))
        byte = torch.arange(256, device=self.codes.device)
        pairs = torch.stack((values[byte & 15], values[byte >> 4]), -1)
        blocks = pairs[self.codes[expert].int()].flatten(-2).unflatten(-1, (-1, 16))
        scale = self.block_scale[expert].to(dtype) * self.global_scale[expert].to(dtype)
        return (blocks * scale.unsqueeze(-1)).flatten(-2)


def silu_gate(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate) * up


def clamped_swiglu_oai(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """MiniMax-M3's and GPT-OSS's."""
    gate = gate.clamp(max=7.0)
    return (up.clamp(-7.0, 7.0) + 1) * gate * torch.sigmoid(1.702 * gate)


def relu2(up: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Nemotron-H's, which has no gate: the first half of w13 is up, and there is no other."""
    return up.clamp(min=0) ** 2


def situ(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Kimi-K3's: SwiGLU whose linear factors are capped at 4 and 25, smoothly."""
    return 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * 25 * torch.tanh(up / 25)


GATES: dict[str, GateFunction] = {
    "silu": silu_gate,
    "swiglu_oai": clamped_swiglu_oai,
    "relu2": relu2,
    "situ": situ,
}


def nearest_nvfp4(x: torch.Tensor) -> torch.Tensor:
    """``x`` ``[..., 16 * n]`` rounded to NVFP4 with a global scale of 1, in float32.

    As vLLM's emulation documents it: a block's scale is its largest magnitude / 6 in E4M3, values
    go to the nearest of E2M1's, ties to the even code.
    """
    blocks = x.float().unflatten(-1, (-1, 16))
    # torch.tensor(1 / 6): the factor that vLLM multiplies by, not a division by 6.
    largest = blocks.abs().amax(-1, keepdim=True) * torch.tensor(1 / 6, device=x.device)
    scale = largest.clamp(max=448).to(torch.float8_e4m3fn).float()
    scaled = blocks * torch.where(scale == 0, 0.0, 1 / scale)
    values = torch.tensor(MAGNITUDES, device=x.device)
    between = (values[1:] + values[:-1]) / 2
    size = scaled.abs().clamp(max=6.0).contiguous()
    low, high = torch.bucketize(size, between), torch.bucketize(size, between, right=True)
    code = torch.where(low % 2 == 0, low, high)
    return (values[code] * scaled.sign() * scale).flatten(-2)


Biases = tuple[torch.Tensor | None, torch.Tensor | None]
"""Of the two products, float ``[experts, out]``; None for none."""


def with_bias(product: torch.Tensor, biases: torch.Tensor | None, expert: int) -> torch.Tensor:
    return product if biases is None else product + biases[expert].to(product)


def routed(
    x: torch.Tensor,
    w13: Stored,
    w2: Stored,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate: str,
    dtype: torch.dtype = torch.float32,
    emulated: bool = False,
    biases: Biases = (None, None),
) -> torch.Tensor:
    """Output of the routed experts, ``[tokens, hidden]`` in ``dtype``, an expert at a time.

    Args:
        x: ``[tokens, hidden]``.
        weights: the router's, ``[tokens, k]``; ids: ``[tokens, k]``.
        biases: added before the activation, and before the router's weight.
        emulated: what goes into each product is first rounded to NVFP4, and weights and what
            comes out of a product or gate to bfloat16, as vLLM's emulation does.
    """

    def bf16(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16().to(dtype) if emulated else tensor

    def product(inputs: torch.Tensor, stored: Stored, bias: torch.Tensor | None) -> torch.Tensor:
        inputs = nearest_nvfp4(inputs).to(dtype) if emulated else inputs
        return with_bias(inputs @ bf16(stored.weight(expert, dtype)).T, bias, expert)

    out = torch.zeros(x.shape, dtype=dtype, device=x.device)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        both = bf16(product(x[token].to(dtype), w13, biases[0]))
        middle = GATES[gate](*both.chunk(2, -1))
        result = product(bf16(middle), w2, biases[1]) * weights[token, slot].to(dtype).unsqueeze(1)
        out.index_add_(0, token, bf16(result))
    return out


def route(logits: torch.Tensor, k: int, gate: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights float32 ``[tokens, k]`` and expert numbers from float32 ``logits``.

    For the clamped gate as MiniMax-M3 routes: sigmoid, a bias (:func:`bias`) for the choice only,
    renormalised, times 2; else as Qwen3: softmax, renormalised.
    """
    scores = logits.sigmoid() if gate == "swiglu_oai" else logits.softmax(-1)
    chosen = scores + bias(logits) if gate == "swiglu_oai" else scores
    ids = chosen.topk(k, dim=-1).indices
    weights = scores.gather(1, ids)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights * (2.0 if gate == "swiglu_oai" else 1.0), ids.int()


def bias(like: torch.Tensor) -> torch.Tensor:
    """The correction bias, float32 ``[experts]``: large enough to change choices."""
    experts = like.shape[-1]
    return torch.linspace(-0.3, 0.3, experts, device=like.device)
