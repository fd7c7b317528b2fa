"""The check at load: silent on what is right, and a refusal for whatever would give wrong text."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantize.experts.gates import Gate
from quantize.native.jit import KernelError
from tests.plugin import nemotron
from tests.plugin.conftest import Damage
from vllm_nvfp4_moe import self_check, settings
from vllm_nvfp4_moe.backends.cpu.method import CpuMethod
from vllm_nvfp4_moe.errors import RefusedError
from vllm_nvfp4_moe.self_check import sample

LAYER = "model.layers.1.mlp.experts"
M3 = Gate("swiglu_oai", 1.702, 1.0, 7.0)
Load = Callable[..., dict[str, Any]]
MonkeyPatch = pytest.MonkeyPatch


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 6e-3)])
def test_a_right_kernel_passes(load: Load, shallow: dict, dtype: str, error: float) -> None:
    for layout in shallow:
        check = load(shallow[layout], dtype=dtype)[
            LAYER
        ].routed_experts.quant_method.context.self_check
        assert check.skipped is None
        assert 0 < check.worst < error


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


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_that_applies_another_gate(
    load: Load, shallow: dict, monkeypatch: MonkeyPatch, wrong: str
) -> None:
    """vLLM has applied SiLU to SwiGLU-OAI, and dropped each of its numbers."""
    apply_as(monkeypatch, WRONG[wrong])
    with pytest.raises(ValueError, match=f"{LAYER}: self-check: the CPU kernel does not") as caught:
        load(shallow["modelopt"])
    if wrong in ("silu", "without its limit", "without alpha", "without beta", "gelu"):
        assert f"It is nearer to what {WRONG[wrong]} would give" in str(caught.value)


SITU = Gate("situ", alpha=4.0, limit=25.0)
NOT_SITU = [
    Gate("silu"),
    Gate("swiglu_oai", limit=25.0),
    replace(SITU, alpha=1.0),
    replace(SITU, alpha=5.0),
    replace(SITU, limit=None),
    replace(SITU, limit=20.0),
]


@pytest.mark.parametrize("applied", [SITU, *NOT_SITU], ids=str)
def test_capped_gates(
    load: Load, damage: Callable[[str], Damage], monkeypatch: MonkeyPatch, applied: Gate
) -> None:
    """Its caps are far out: the batch must reach them."""
    folder = damage("modelopt").config(lambda c: c["nvfp4_moe"].update(gate=asdict(SITU)))
    if applied == SITU:
        check = load(folder, dtype="float32")[LAYER].routed_experts.quant_method.context.self_check
        assert (check.skipped, check.worst < 1e-5) == (None, True)
        return
    apply_as(monkeypatch, applied)
    with pytest.raises(ValueError, match=f"{LAYER}: self-check: the CPU kernel does not"):
        load(folder)


def swap_halves(layer: Any) -> None:
    for tensor in (layer.w13_weight.data, layer.w13_weight_scale.data.view(torch.uint8)):
        half = tensor.shape[1] // 2
        tensor.copy_(torch.cat((tensor[:, half:], tensor[:, :half]), 1))


def swap_nibbles(layer: Any) -> None:
    codes = layer.w2_weight.data
    codes.copy_((codes >> 4) | (codes << 4))


def shift_experts(layer: Any) -> None:
    layer.w13_weight.data.copy_(layer.w13_weight.data.roll(1, 0))


def shift_the_last_expert(layer: Any) -> None:
    layer.w2_weight.data[-1] = layer.w2_weight.data[0]


def shift_scales(layer: Any) -> None:
    scales = layer.w13_weight_scale.data.view(torch.uint8)
    scales.copy_(scales.roll(1, 2))


def mirror_rows(layer: Any) -> None:
    for tensor in (layer.w2_weight.data, layer.w2_weight_scale.data.view(torch.uint8)):
        tensor[:, -16:] = tensor[:, -16:].flip(1)


def double_a_global_scale(layer: Any) -> None:
    layer.w2_weight_scale_2.data *= 2


def lose_a_row_of_scales(layer: Any) -> None:
    layer.w2_weight_scale.data.view(torch.uint8)[:, -1] = 0


BROKEN = [
    swap_halves,
    swap_nibbles,
    shift_experts,
    shift_the_last_expert,
    shift_scales,
    mirror_rows,
    double_a_global_scale,
    lose_a_row_of_scales,
]


def shift_rows(layer: Any) -> None:
    for tensor in (layer.w13_weight.data, layer.w13_weight_scale.data.view(torch.uint8)):
        tensor.copy_(tensor.roll(16, 1))


def lose_the_last_rows(layer: Any) -> None:
    inner = layer.w13_weight.shape[1]
    layer.w13_weight.data[:, inner // 2 :] = 0  # as if half of them were a gate's


UNGATED = [shift_rows, lose_the_last_rows]
"""Conversions that break experts without a gate."""


@pytest.mark.parametrize("broken", [*BROKEN, *UNGATED], ids=lambda f: f.__name__)
def test_a_conversion_that_breaks_weights(
    load: Load, shallow: dict, ungated: dict, monkeypatch: MonkeyPatch,
    broken: Callable[[Any], None],
) -> None:  # fmt: skip
    folder, name = (shallow, LAYER) if broken in BROKEN else (ungated, nemotron.LAYER)
    prepare = CpuMethod.prepare

    def convert(self: CpuMethod, layer: Any) -> None:
        prepare(self, layer)
        broken(layer)

    monkeypatch.setattr(CpuMethod, "prepare", convert)
    with pytest.raises(ValueError, match="self-check: the CPU kernel does not compute what"):
        load(folder["modelopt"])
    monkeypatch.setenv(settings.SELF_CHECK, "0")
    method = load(folder["modelopt"])[name].routed_experts.quant_method
    assert method.context.self_check.worst is None


def rounded(x: torch.Tensor, input_scale: torch.Tensor) -> torch.Tensor:
    """vLLM's own reference for 4-bit activations."""
    from vllm.model_executor.layers.quantization.utils import nvfp4_emulation_utils as theirs

    codes, scales = theirs.ref_nvfp4_quant(x, 1 / input_scale, 16)
    return (codes.unflatten(-1, (-1, 16)) * scales.unsqueeze(-1) * input_scale).flatten(-2)


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
    load: Load, shallow: dict, monkeypatch: MonkeyPatch, wrong: str | None
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
    load: Load, damage: Callable[[str], Damage], monkeypatch: MonkeyPatch
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
    load: Load, shallow: dict, monkeypatch: MonkeyPatch, wrong: str
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
    load: Load, damage: Callable[[str], Damage], monkeypatch: MonkeyPatch, by_expert: bool
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


def test_a_check_that_cannot_be_made_is_said(
    load: Load, shallow: dict, monkeypatch: MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise NotImplementedError("not with this kernel")

    monkeypatch.setattr(self_check, "run_alone", fail)
    logging.getLogger("vllm").propagate = True
    with caplog.at_level(logging.WARNING):
        check = load(shallow["modelopt"])[LAYER].routed_experts.quant_method.context.self_check
    assert check.worst is None
    assert check.skipped == "NotImplementedError: not with this kernel"
    assert f"{LAYER}: the self-check of the CPU kernel could not be made: NotImpl" in caplog.text
    assert "not with this kernel" in caplog.text


def test_a_kernel_that_asks_for_the_forward_context(
    load: Load, shallow: dict, monkeypatch: MonkeyPatch
) -> None:
    """As Humming does; vLLM sets none while it loads."""
    from vllm.forward_context import get_forward_context

    apply = CpuMethod.apply
    asked = []

    def ask(self: CpuMethod, *args: Any) -> torch.Tensor:
        if args[1].shape[0] == sample.TOKENS:
            asked.append(get_forward_context().dp_metadata)
        return apply(self, *args)

    monkeypatch.setattr(CpuMethod, "apply", ask)
    check = load(shallow["modelopt"])[LAYER].routed_experts.quant_method.context.self_check
    assert check.skipped is None
    assert asked == [None]


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


def test_a_kernel_that_routes(load: Load, shallow: dict, monkeypatch: MonkeyPatch) -> None:
    routes = Routes(monkeypatch, -torch.inf, False)
    check = load(shallow["modelopt"])[LAYER].routed_experts.quant_method.context.self_check
    assert check.skipped is None
    assert 0 < check.worst < 6e-3
    logits = torch.cat(routes.logits)
    assert (logits < 0).all(1).any()
    ties = [len(row.unique()) == 2 for row in logits]
    assert any(ties) and not all(ties)


def test_a_router_that_prepares_logits(load: Load, shallow: dict, monkeypatch: MonkeyPatch) -> None:
    """vLLM 0.33 hands a kernel what its router makes of the logits."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    routes = Routes(monkeypatch, -torch.inf, False)
    right = routes.route
    routes.route = lambda layer, logits: right(layer, logits - 8)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="self-check: the CPU kernel does not compute what"):
        load(shallow["modelopt"])
    shift = lambda self, logits: logits + 8  # noqa: E731
    monkeypatch.setattr(CPURouter, "prepare_monolithic_logits", shift, raising=False)
    check = load(shallow["modelopt"])[LAYER].routed_experts.quant_method.context.self_check
    assert check.skipped is None
    assert 0 < check.worst < 6e-3


def test_a_router_that_throws_dice(load: Load, shallow: dict, monkeypatch: MonkeyPatch) -> None:
    """vLLM's option for measuring speed; serving goes on."""
    Routes(monkeypatch, -torch.inf, False)
    monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random")
    check = load(shallow["modelopt"])[LAYER].routed_experts.quant_method.context.self_check
    assert "experts are chosen at random" in check.skipped


@pytest.mark.parametrize(("floor", "first_of_equals"), [(0.0, False), (-torch.inf, True)])
def test_a_kernel_that_routes_wrong(
    load: Load,
    damage: Callable[[str], Damage],
    monkeypatch: MonkeyPatch,
    floor: float,
    first_of_equals: bool,
) -> None:
    """With random logits alone both pass: some are positive, and none are equal. Nor are they with
    correction biases that differ."""

    def without_biases(tensors: dict[str, torch.Tensor]) -> None:
        (name,) = (name for name in tensors if name.endswith("e_score_correction_bias"))
        tensors[name].zero_()

    Routes(monkeypatch, floor, first_of_equals)
    with pytest.raises(ValueError, match="self-check: the CPU kernel does not compute what"):
        load(damage("modelopt").tensors(without_biases))


KERNELS = ("forward", "expand")
"""The CPU's two with numba: loops for few tokens an expert, and what expands weights for many."""


@pytest.mark.usefixtures("numba")
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_that_a_backend_chooses_among(
    load: Load, shallow: dict, monkeypatch: MonkeyPatch, kernel: str
) -> None:
    from vllm_nvfp4_moe.backends.cpu import kernels

    right = getattr(kernels, kernel)
    monkeypatch.setattr(kernels, kernel, lambda *args: right(*args) * 1.05)
    with pytest.raises(ValueError, match="self-check: the CPU kernel does not compute what"):
        load(shallow["modelopt"])


def test_a_row_that_is_wrong_among_many_alone(
    load: Load, shallow: dict, monkeypatch: MonkeyPatch
) -> None:
    apply = CpuMethod.apply

    def last_row(self: CpuMethod, *args: Any) -> torch.Tensor:
        output = apply(self, *args)
        output[sample.TOKENS :] *= 1.1
        return output

    monkeypatch.setattr(CpuMethod, "apply", last_row)
    with pytest.raises(ValueError, match=r"of 32 token.*: relative error 0\.(09|10)"):
        load(shallow["modelopt"])


def test_a_kernel_that_cannot_run(load: Load, shallow: dict, monkeypatch: MonkeyPatch) -> None:
    """No traceback, and no server that fails at its first request."""

    def fail(*_: Any) -> None:
        raise KernelError("CUDA error 700: an illegal memory access\nwas encountered")

    monkeypatch.setattr(self_check, "run_alone", fail)
    with pytest.raises(ValueError, match=r"self-check: the CPU kernel cannot run here: .* access"):
        load(shallow["modelopt"])


def test_a_device_that_a_kernel_broke(load: Load, shallow: dict, monkeypatch: MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        monkeypatch.setattr(self_check, "_device_works", lambda layer: False)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(self_check, "run_alone", fail)
    with pytest.raises(ValueError, match=r"self-check: the CPU kernel cannot run here: Runtime"):
        load(shallow["modelopt"])


def test_what_kernels_keep_is_not_allocated_during_the_check(
    load: Load, shallow: dict, monkeypatch: MonkeyPatch
) -> None:
    """It would lie in the memory of weights, which sleep mode discards."""
    from vllm.forward_context import is_forward_context_available
    from vllm.v1.worker import workspace

    apply = CpuMethod.apply
    taken = []

    def with_locks(self: CpuMethod, *args: Any) -> torch.Tensor:
        if is_forward_context_available():  # not where the backend compiles
            manager = workspace.current_workspace_manager()
            taken.append(manager.get_persistent("locks", (4,), torch.int, zero_init=True))
        return apply(self, *args)

    monkeypatch.setattr(CpuMethod, "apply", with_locks)
    engines = workspace.WorkspaceManager(torch.device("cpu"))
    monkeypatch.setattr(workspace, "_manager", engines)
    load(shallow["modelopt"])
    assert taken
    assert workspace.current_workspace_manager() is engines
    assert engines._persistent_resources == [{}]


def test_one_layer_of_a_kind(
    load: Load, quantized: dict[str, Path], monkeypatch: MonkeyPatch
) -> None:
    checked = []
    after = self_check.SelfCheck.after

    def note(self: Any, sample: Any, layer: Any, method: Any) -> None:
        checked.append(layer.layer_name)
        after(self, sample, layer, method)

    monkeypatch.setattr(self_check.SelfCheck, "after", note)
    runners = load(quantized["modelopt"])
    assert len(runners) > 3
    assert checked == [LAYER]
