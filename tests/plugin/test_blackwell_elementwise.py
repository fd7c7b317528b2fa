"""That alpha, beta and limit arrive at vLLM's elementwise kernels, which do the gate for CUTLASS,
Marlin and emulation, and in the expression that Humming compiles.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.activation import ApplyMoEActivationConfig
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

from quantize.experts.gates import Gate
from tests.plugin.blackwell import (
    ACTIVATION,
    FUSED_MOE,
    GELU,
    GELU_TANH,
    M3,
    RELU2,
    SILU,
    SITU,
    STEP,
    moe_config,
)
from tests.plugin.blackwell_layer import (
    CLAMPED_SILU,
    INNER,
    NUMBERED,
    OTHER,
    SITU_UNCAPPED,
    SOFT,
    TOKENS,
    TOPK,
    applied,
    experts_of,
    layer_of,
    quant_config_of,
    run,
)
from tests.plugin.reference import relu2


class Operators:
    """``torch.ops._C``'s activation operators: who was called, with which numbers and input."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[Any, ...]] = []
        for name in (
            "silu_and_mul",
            "silu_and_mul_with_clamp",
            "gelu_and_mul",
            "gelu_tanh_and_mul",
            "situ_and_mul",
        ):
            record = self._named(name)
            monkeypatch.setattr(torch.ops._C, name, record, raising=False)
        module = importlib.import_module("vllm.model_executor.layers.activation")
        step = inspect.signature(module.swiglustep_and_mul_triton)

        def swiglustep(*args: Any, **kwargs: Any) -> None:
            bound = step.bind(*args, **kwargs)
            bound.apply_defaults()
            self._named("swiglustep")(*bound.args)

        monkeypatch.setattr(module, "swiglustep_and_mul_triton", swiglustep)

    def _record(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        monkeypatch.setattr(torch.ops._C, name, self._named(name), raising=False)

    def _named(self, name: str) -> Any:
        return lambda output, input, *numbers: self.calls.append((name, input, *numbers))

    @property
    def only(self) -> tuple[Any, ...]:
        ((name, _, *numbers),) = self.calls
        return (name, *numbers)


# vLLM's elementwise operators, with the numbers that they take after their tensors:
# silu_and_mul_with_clamp(limit, alpha, beta), as in vllm/model_executor/layers/activation.py:249;
# situ_and_mul(beta, linear_beta), :162.
OPERATOR: dict[Gate, tuple[Any, ...]] = {
    M3: ("silu_and_mul_with_clamp", 7.0, 1.702, 1.0),
    OTHER: ("silu_and_mul_with_clamp", 3.0, 1.3, 0.5),
    CLAMPED_SILU: ("silu_and_mul_with_clamp", 10.0, 1.0, 0.0),
    GELU: ("gelu_and_mul",),
    GELU_TANH: ("gelu_tanh_and_mul",),
    STEP: ("swiglustep", 7.0),
    SITU: ("situ_and_mul", 4.0, 25.0),
    SITU_UNCAPPED: ("situ_and_mul", 1.5, -1.0),  # not above 0: up goes through
}


@pytest.mark.parametrize("gate", [SILU, *OPERATOR, RELU2], ids=str)
def test_vllm_cutlass(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    module = importlib.import_module(f"{FUSED_MOE}.experts.cutlass_moe")
    operators = Operators(monkeypatch)
    fused: list[Any] = []
    torch.manual_seed(0)
    width = 2 * INNER if gate.gated else INNER
    first = torch.randn(TOKENS * TOPK, width, dtype=torch.bfloat16)
    inputs: list[torch.Tensor] = []
    quantized = torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)

    def quantize(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        inputs.append(x.clone())
        return quantized

    def product(out: torch.Tensor, *_: Any) -> None:
        out.copy_(first if out.shape == first.shape else torch.zeros_like(out))

    monkeypatch.setattr(
        module,
        "ops",
        SimpleNamespace(
            get_cutlass_moe_mm_data=lambda *_, **__: None,
            shuffle_rows=lambda a, _: a.expand(TOKENS * TOPK, -1) if len(a) == 1 else a,
            scaled_fp4_experts_quant=quantize,
            silu_and_mul_scaled_fp4_experts_quant=lambda *a: (fused.append(a), quantized)[1],
            cutlass_fp4_moe_mm=product,
        ),
    )
    run(experts_of("VLLM_CUTLASS", module.CutlassExpertsFp4, gate), gate, packed=False)
    if gate == SILU:  # a kernel of its own, fused with the quantization
        assert len(fused) == 1 and not operators.calls
        return
    if gate == RELU2:  # plain PyTorch
        assert not operators.calls and not fused
        torch.testing.assert_close(inputs[-1], relu2(first))
        return
    assert operators.only == OPERATOR[gate] and not fused
    assert torch.equal(operators.calls[0][1], first)  # all of gate, then all of up, unscaled


@pytest.mark.parametrize("gate", OPERATOR, ids=str)
def test_marlin(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    module = importlib.import_module(f"{FUSED_MOE}.experts.marlin_moe")
    operators = Operators(monkeypatch)

    def fused_marlin_moe(**kwargs: Any) -> None:
        middle = torch.zeros(TOKENS * TOPK, 2 * INNER)
        kwargs["activation_func"](kwargs["activation"], middle[:, :INNER].clone(), middle)

    monkeypatch.setattr(module, "fused_marlin_moe", fused_marlin_moe)
    run(experts_of("MARLIN", module.MarlinExperts, gate), gate, packed=False)
    assert operators.only == OPERATOR[gate]


@pytest.mark.parametrize("gate", OPERATOR, ids=str)
def test_emulation(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    """Its ``apply`` is Triton but for this call (nvfp4_emulation_moe.py:512)."""
    module = importlib.import_module(f"{FUSED_MOE}.experts.nvfp4_emulation_moe")
    operators = Operators(monkeypatch)
    experts = experts_of("EMULATION", module.Nvfp4QuantizationEmulationTritonExperts, gate)
    middle = torch.zeros(TOKENS * TOPK, 2 * INNER)
    experts.activation(ACTIVATION[gate.form], middle[:, :INNER].clone(), middle)
    assert operators.only == OPERATOR[gate]


def evaluated(impl: str, a: float, b: float) -> float:
    """The value of a CUDA expression or lambda of Humming's, in Python."""
    code = re.sub(r"(\d+\.\d*)f\b", r"\1", impl)
    names: dict[str, Any] = {"a": a, "b": b, "fminf": min, "fmaxf": max}
    names |= {"expf": math.exp, "erff": math.erf, "tanhf": math.tanh}
    if not code.startswith("["):
        return eval(code, names)
    for statement in code[code.index("{") + 1 : code.rindex("}")].split(";"):
        words = statement.strip()
        if words.startswith("return "):
            return eval(words.removeprefix("return "), names)
        name, _, value = words.removeprefix("const float ").partition(" = ")
        names[name] = eval(value, names)
    raise AssertionError(impl)


def step(g: float, u: float) -> float:
    """Step-3's gate, with a limit of 7."""
    return min(g / (1 + math.exp(-g)), 7.0) * max(min(u, 7.0), -7.0)


@pytest.mark.parametrize("gate", [SILU, *NUMBERED, GELU, STEP, *SOFT, SITU_UNCAPPED], ids=str)
def test_humming(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    """Its kernels are compiled from an expression; that is the gate, numbers and all."""
    module = importlib.import_module(f"{FUSED_MOE}.experts.fused_humming_moe")
    numbers: dict[str, Any] = {}

    def quant_config(layer: Any, **gemm1: Any) -> Any:
        numbers.update(gemm1)
        return SimpleNamespace(w2_input_scale=None, w2_input_scale_2=None, **gemm1)

    humming = "vllm.model_executor.layers.quantization.utils.humming"
    monkeypatch.setattr(f"{humming}.get_humming_moe_quant_config", quant_config)
    layer: Any = layer_of(gate)
    layer.__class__ = RoutedExperts  # which vLLM insists on
    experts: Any = object.__new__(module.HummingIndexedExperts)
    experts.quant_config = quant_config_of("HUMMING", layer)
    experts.quant_config.w2_hadamard_block_size = 1
    mode = SimpleNamespace(should_quantize=False, has_secondary_scale=False, has_group_scale=False)
    experts.humming_configs = {"w2": SimpleNamespace(input_quant_mode=mode)}
    experts.activation_config = ApplyMoEActivationConfig.from_configs(
        moe_config(gate), experts.quant_config
    )
    seen: dict[str, Any] = {}

    def may_process_input(config: Any, **kwargs: Any) -> tuple[None, None, None]:
        seen.update(kwargs)
        return None, None, None

    library = importlib.import_module("vllm.utils.humming")
    monkeypatch.setitem(vars(library), "may_process_input", may_process_input)
    experts.process_input(
        "w2", inputs=torch.zeros(1), quanted_input=None, activation=ACTIVATION[gate.form]
    )
    assert seen["activation_type"] == "binary_split"  # all of gate, then all of up
    for g in (-9.0, -1.5, 0.0, 0.25, 2.0, 6.5, 9.0, 12.0):
        for u in (-11.0, -2.0, 0.0, 0.5, 8.0):
            if gate == GELU:
                want = 0.5 * g * (1 + math.erf(g / math.sqrt(2))) * u
            elif gate == STEP:
                want = step(g, u)
            else:
                pair = torch.tensor([g, u], dtype=torch.float64)
                want = float(applied(gate, pair[0], pair[1]))
            assert evaluated(seen["activation_impl"], g, u) == pytest.approx(want, abs=1e-9)
