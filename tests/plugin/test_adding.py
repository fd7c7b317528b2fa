"""A backend is one file and one registration, a gate one file and one line: both are added here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

from quantize.experts.gates import FORMS, Gate
from quantize.nvfp4.format import dequantize
from tests.plugin.conftest import Damage
from tests.plugin.reference import experts_of, routed
from tests.plugin.test_layer import relative, routing
from vllm_nvfp4_moe import activation, backends
from vllm_nvfp4_moe.backends.gate_support import drops
from vllm_nvfp4_moe.method import NvFp4MoEMethod

LAYER = "model.layers.1.mlp.experts"
Load = Callable[..., dict[str, Any]]


class PlainMethod(NvFp4MoEMethod):
    """All that a backend needs: experts in plain float32, one token and one expert at a time."""

    @classmethod
    def unsupported(cls, layer: Any) -> str | None:
        return None

    @property
    def kernel(self) -> str:
        return "plain PyTorch"

    def prepare(self, layer: Any) -> None:
        pass  # the weights stay as they are

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        return None

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any,
        shared_experts_input: torch.Tensor | None,
    ) -> torch.Tensor:
        output = torch.zeros(x.shape)
        for token, (weights, ids) in enumerate(zip(topk_weights, topk_ids.tolist(), strict=True)):
            for weight, expert in zip(weights, ids, strict=True):
                scale = layer.w13_weight_scale_2[expert, 0]
                both = dequantize(layer.w13_weight[expert], layer.w13_weight_scale[expert], scale)
                scale = layer.w2_weight_scale_2[expert]
                down = dequantize(layer.w2_weight[expert], layer.w2_weight_scale[expert], scale)
                middle = self.gate.apply_stacked(both @ x[token].float())
                output[token] += weight * (down @ middle)
        return output.to(x.dtype)


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_a_backend(
    load: Load, shallow: dict[str, Path], monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setattr(backends, "methods", lambda: iter([PlainMethod]))
    layer = load(shallow[layout], dtype="float32")[LAYER].routed_experts
    method = layer.quant_method
    assert type(method) is PlainMethod
    assert 0 < method.context.self_check.worst < 1e-5
    torch.manual_seed(0)
    x = torch.randn(3, 384)
    weights, ids = routing(3)
    truth = routed(x, experts_of(shallow[layout], LAYER, layout, 32), weights, ids)
    assert relative(method.apply(layer, x, weights, ids, None, None), truth) < 1e-5


class SquaredRelu:
    """All that a form of gate needs: ``up * relu(gate) ** 2``."""

    gated = True
    numbers: tuple[str, ...] = ()

    @staticmethod
    def apply(
        gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
    ) -> torch.Tensor:
        return up * gate.relu() ** 2

    @staticmethod
    def recover(probe: Any) -> None:
        return None


def test_a_gate(
    load: Load, damage: Callable[[str], Damage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on CPUs. On GPUs no kernel counts as applying it until somebody has read one."""
    form = "squared_relu"
    monkeypatch.setitem(FORMS._places, form, f"{__name__}:{SquaredRelu.__name__}")
    monkeypatch.setitem(activation.VLLM_NAME, form, MoEActivation.RELU2)
    folder = damage("modelopt").config(lambda c: c["nvfp4_moe"].update(gate={"form": form}))
    layer = load(folder, dtype="float32")[LAYER].routed_experts
    assert layer.activation == layer.moe_config.activation == MoEActivation.RELU2
    check = layer.quant_method.context.self_check
    assert (check.skipped, check.worst < 1e-5) == (None, True)
    experts = experts_of(folder, LAYER, "modelopt", 32)
    for tokens in (1, 300):
        torch.manual_seed(tokens)
        x = torch.randn(tokens, 384)
        weights, ids = routing(tokens)
        truth = routed(x, experts, weights, ids, lambda g, u: u * g.relu() ** 2)
        out = layer.quant_method.apply(layer, x, weights, ids, None, None)
        assert relative(out, truth) < 1e-5, tokens
    for backend in [*NvFp4MoeBackend, SimpleNamespace(value="TOMORROW")]:
        assert drops(backend, Gate(form)) is not None
