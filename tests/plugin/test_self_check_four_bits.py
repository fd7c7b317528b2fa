"""The check at load where activations are rounded to 4 bits: noise hides no wrong gate, nor is it
taken for one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantize.experts.gates import Gate
from tests.plugin.conftest import Damage, Loader
from tests.plugin.stand_ins import LAYER, M3, WRONG, round_activations, rounded
from vllm_nvfp4_moe import self_check
from vllm_nvfp4_moe.backends.cpu.method import CpuMethod
from vllm_nvfp4_moe.errors import RefusedError
from vllm_nvfp4_moe.self_check import sample

MonkeyPatch = pytest.MonkeyPatch


@pytest.mark.parametrize("scale", [1.0, 0.02, 1e-4])
def test_activations_are_rounded_as_by_vllm(scale: float) -> None:
    """1e-4 saturates the block scales of the larger blocks."""
    torch.manual_seed(0)
    x = torch.randn(7, 96) * torch.logspace(-3, 2, 7).unsqueeze(1)
    x[3, :16] = 0
    ours = sample.round_nvfp4(x, torch.tensor(scale))
    torch.testing.assert_close(ours, rounded(x, torch.tensor(scale)), rtol=1e-6, atol=0)


# Numbers that are off by a seventh drown in the noise.
SHOWS = [wrong for wrong in WRONG if not wrong.startswith("another")]


@pytest.mark.parametrize("wrong", [None, *SHOWS])
def test_kernels_with_4_bit_activations(
    load: Loader, shallow: dict, monkeypatch: MonkeyPatch, wrong: str | None
) -> None:
    """As Blackwell's: their noise is larger than what some wrong gates change, and still they are
    told apart."""
    round_activations(monkeypatch, WRONG[wrong] if wrong else None)
    if wrong is None:
        check = load(shallow["modelopt"])[LAYER].routed_experts.quant_method.context.self_check
        assert check.skipped is None
        assert 0 < check.worst < 0.15
        return
    with pytest.raises(ValueError, match="self-check: the CPU kernel does not compute what"):
        load(shallow["modelopt"])


def test_gates_that_noise_cannot_tell_apart(
    load: Loader, damage: Callable[[str], Damage], monkeypatch: MonkeyPatch
) -> None:
    """GELU and its approximation by tanh: neither may be taken for the other."""
    round_activations(monkeypatch, None)
    for form in ("gelu", "gelu_tanh"):
        copy = damage("modelopt")
        folder = copy.config(lambda c, form=form: c["nvfp4_moe"].update(gate={"form": form}))
        check = load(folder)[LAYER].routed_experts.quant_method.context.self_check
        assert check.skipped is None
        assert 0 < check.worst < 0.15
        shutil.rmtree(folder)


@pytest.mark.parametrize("wrong", SHOWS)
def test_a_kernel_for_one_token_with_4_bit_activations(
    load: Loader, shallow: dict, monkeypatch: MonkeyPatch, wrong: str
) -> None:
    """Of one token alone, roundings could look like another gate; of several, each alone, not."""
    round_activations(monkeypatch, None)
    right = CpuMethod.apply
    round_activations(monkeypatch, WRONG[wrong])
    other = CpuMethod.apply

    def apply(self: Any, layer: Any, x: Any, *args: Any) -> torch.Tensor:
        return (other if len(x) == 1 else right)(self, layer, x, *args)

    monkeypatch.setattr(CpuMethod, "apply", apply)
    with pytest.raises(ValueError, match=r"does not compute what .* of 16 token\(s\), each alone"):
        load(shallow["modelopt"])


@pytest.mark.parametrize(
    ("tokens", "inner", "layers"), [(1, 48, 200), (16, 16, 50), (16, 128, 20)], ids=str
)
def test_few_values_are_no_evidence_for_another_gate(tokens: int, inner: int, layers: int) -> None:
    """Of a narrow slice's 4-bit activations, those that a right kernel rounds another way may look
    like another gate. No layer is refused for that, and with 16 tokens all wrong gates are
    found."""
    hidden, one = 448, torch.tensor(1.0)
    method: Any = SimpleNamespace(kernel="some", gate=M3, activation_bits=4, rounds_weights=False)
    layer: Any = SimpleNamespace(layer_name=LAYER)
    gates = [M3, Gate("silu"), replace(M3, alpha=1.0), replace(M3, beta=0.0)]
    large = torch.where(torch.arange(tokens) % 2 == 0, 5.25, 1.0).unsqueeze(1)
    for seed in range(layers):
        torch.manual_seed(seed)
        w2, pre = torch.randn(hidden, inner), torch.randn(tokens, 2 * inner) * large

        def output(gate: Gate, pre: torch.Tensor, w2: torch.Tensor = w2) -> torch.Tensor:
            return rounded(gate.apply_stacked(pre), one) @ w2.T

        truth: dict[Gate | str, torch.Tensor] = {gate: output(gate, pre) for gate in gates}
        none = torch.empty(0)
        given = sample.Sample(none, none, none, None, truth, values=2 * tokens * inner)
        # As kernels differ: what goes into the gate is off by a rounding to bfloat16.
        off = pre * (1 + torch.randn_like(pre) * 2**-9)
        for gate in gates if tokens > 1 else gates[:1]:
            check = self_check.SelfCheck()
            if gate == M3 and self_check.error_of(output(M3, off), truth[M3]).token < 0.25:
                check._judge(output(gate, off), given, layer, method, "")
            elif gate != M3:
                with pytest.raises(RefusedError, match="It is nearer to what"):
                    check._judge(output(gate, off), given, layer, method, "")


@pytest.mark.parametrize("by_expert", [False, True])
def test_calibrated_input_scales(
    load: Loader, damage: Callable[[str], Damage], monkeypatch: MonkeyPatch, by_expert: bool
) -> None:
    """As other tools write them: each expert's own, some so small that its activations saturate."""

    def calibrate(tensors: dict[str, torch.Tensor]) -> None:
        for number in range(32):
            for name, scale in (("gate", 0.005), ("up", 0.005), ("down", 0.02)):
                of = tensors[f"{LAYER}.{number}.{name}_proj.input_scale"]
                of.fill_(scale / 2 ** (number % 4))

    round_activations(monkeypatch, None, by_expert)
    folder = damage("modelopt").tensors(calibrate)
    check = load(folder)[LAYER].routed_experts.quant_method.context.self_check
    assert check.skipped is None
    assert 0 < check.worst < 0.2
