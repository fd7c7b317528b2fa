"""The CPU's kernel as others are: with another gate, 4-bit activations, or a routing of its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from quantize.experts.gates import Gate
from vllm_nvfp4_moe.backends.cpu.method import CpuMethod

LAYER = "model.layers.1.mlp.experts"
M3 = Gate("swiglu_oai", 1.702, 1.0, 7.0)
MonkeyPatch = pytest.MonkeyPatch

WRONG = {
    "silu": Gate("silu"),
    "without its limit": replace(M3, limit=None),
    "another limit": replace(M3, limit=8.0),
    "without alpha": replace(M3, alpha=1.0),
    "another alpha": replace(M3, alpha=1.5),
    "without beta": replace(M3, beta=0.0),
    "gelu": Gate("gelu_tanh"),
    "a clamp at the wrong place": Gate("swiglu_step", limit=7.0),
}


def apply_as(monkeypatch: MonkeyPatch, gate: Gate) -> None:
    """Have the CPU kernel apply ``gate``, whatever the contract says."""
    apply = CpuMethod.apply

    def elsewhere(self: CpuMethod, *args: Any) -> torch.Tensor:
        right, self.gate = self.gate, gate
        try:
            return apply(self, *args)
        finally:
            self.gate = right

    monkeypatch.setattr(CpuMethod, "apply", elsewhere)


def rounded(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """vLLM's own reference for 4-bit activations."""
    from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils as theirs

    codes, scales = theirs.ref_nvfp4_quant(x, 1 / input_scale, 16)
    return (codes.unflatten(-1, (-1, 16)) * scales.unsqueeze(-1) * input_scale).flatten(-2)


def round_activations(
    monkeypatch: MonkeyPatch, wrong: Gate | None, by_expert: bool = False, by_row: bool = False
) -> None:
    """Have the CPU's method compute as a kernel with 4-bit activations would, with the gate
    ``wrong`` in place of its own. It rounds the gate's output to bfloat16 before, which moves some
    codes. With ``by_row``, each token's input scale is its own."""
    from quantize.nvfp4.format import dequantize

    def apply(self: Any, layer: Any, x: Any, weights: Any, ids: Any, *_: Any) -> torch.Tensor:
        output = torch.zeros(x.shape)
        gate = wrong or self.gate
        for token in range(len(x)):
            for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
                w13 = dequantize(
                    layer.w13_weight[expert], layer.w13_weight_scale[expert],
                    layer.w13_weight_scale_2[expert],
                )  # fmt: skip
                w2 = dequantize(
                    layer.w2_weight[expert], layer.w2_weight_scale[expert],
                    layer.w2_weight_scale_2[expert],
                )  # fmt: skip
                scales = layer.w13_input_scale, layer.w2_input_scale
                first, second = (s[expert].max() if by_expert else s.max() for s in scales)
                row = x[token : token + 1].float()
                pre = rounded(row, row.abs().max() / 2688 if by_row else first) @ w13.T
                middle = gate.apply_stacked(pre.bfloat16().float()).bfloat16().float()
                second = middle.abs().max() / 2688 if by_row else second
                output[token] += (weight * (rounded(middle, second) @ w2.T))[0]
        return output.bfloat16()

    monkeypatch.setattr(CpuMethod, "apply", apply)
    monkeypatch.setattr(CpuMethod, "quantizes_activations", True)
    monkeypatch.setattr(CpuMethod, "input_scales_by_expert", by_expert)


class Routes:
    """Has the CPU's method route by itself, as kernels for Blackwell do.

    Args:
        floor: what the k-th best is compared with first; 0 for a kernel that overlooks negative
            scores of a router.
    """

    def __init__(self, monkeypatch: MonkeyPatch, floor: float, first_of_equals: bool) -> None:
        self.logits: list[torch.Tensor] = []
        self.floor, self.first_of_equals = floor, first_of_equals
        routes = self

        def apply(self: CpuMethod, layer: Any, x: Any, logits: Any, *_: Any) -> torch.Tensor:
            routes.logits.append(logits)
            return CpuMethod.apply(self, layer, x, *routes.route(layer, logits), None, None)

        monkeypatch.setattr(CpuMethod, "is_monolithic", True)
        monkeypatch.setattr(CpuMethod, "apply_monolithic", apply)

    def route(self, layer: Any, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """MiniMax-M3's, from its formula: sigmoid, bias for the choice alone, renormalised."""
        scores = logits.float().sigmoid()
        biased = scores + layer.e_score_correction_bias.float()
        biased = biased.masked_fill(logits < self.floor, -torch.inf)
        if self.first_of_equals:  # takes the best again and again, for all that have its score
            best = biased.amax(1, keepdim=True)
            ids = (biased == best).int().argmax(1, keepdim=True)
            rest = biased.masked_fill(biased == best, -torch.inf).topk(layer.top_k - 1, 1).indices
            ids = torch.cat((ids, rest), 1)
        else:
            ids = biased.topk(layer.top_k, 1).indices
        weights = scores.gather(1, ids)
        return weights / weights.sum(1, keepdim=True), ids.int()
