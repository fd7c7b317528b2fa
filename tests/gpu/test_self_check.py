"""The check at load with vLLM's kernels and our own: silent where they are right, and a stop where
a gate or a conversion was broken on purpose, which stock vLLM serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.gpu.layer import Case, Shape, build, error, skip_elsewhere
from vllm_nvfp4_moe import self_check, settings
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

SHAPES = [
    Shape("minimax-m3", 128, 6144, 3072, 4),
    Shape("m3-nano", 32, 384, 128, 4),
    Shape("pad-both", 32, 2880, 720, 4),
]
BACKENDS = ("hopper", "hopper fp8", "humming", "marlin", "emulation")
ERROR = {"hopper fp8": 0.09, "emulation": 0.25}
"""Of a batch, from what activations of fewer bits cost; of the others 0.01."""
GATE = "swiglu_oai"
MonkeyPatch = pytest.MonkeyPatch


@pytest.fixture(scope="module", params=SHAPES, ids=lambda shape: shape.name)
def case(gpu: torch.device, request: pytest.FixtureRequest) -> Case:
    return Case(request.param, (16,), gpu)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", ["silu", GATE])
def test_right_kernels_pass(
    case: Case, backend: str, gate: str, measured: list[dict[str, Any]]
) -> None:
    skip_elsewhere(backend)
    build(case.shape, gate, case.w13, case.w2, backend)  # compiles
    check = build(
        case.shape, gate, case.w13, case.w2, backend
    ).experts.quant_method.context.self_check
    assert check.skipped is None
    assert check.worst is not None
    measured.append(
        {"shape": case.shape.name, "backend": backend, "gate": gate, "batch": "self-check",
         "check": check.worst, "seconds": check.seconds}
    )  # fmt: skip
    if backend == "hopper fp8":
        assert check.worst < self_check.ROUNDED_WEIGHTS.token
    else:
        assert check.worst < self_check.BOUNDS[4 if backend == "emulation" else 16].token / 2
    assert check.seconds < 2


def other_numbers(**numbers: float) -> Callable[[MonkeyPatch], None]:
    """The kernels are told another alpha, beta or limit."""

    def change(monkeypatch: MonkeyPatch) -> None:
        from vllm.model_executor.layers.quantization import modelopt

        make = modelopt.make_nvfp4_moe_quant_config

        def told(*, layer: Any, **more: Any) -> Any:
            before = {name: getattr(layer, name) for name in numbers}
            for name, number in numbers.items():
                setattr(layer, name, number)  # which Humming reads
            try:
                return make(layer=layer, **more | numbers)
            finally:
                for name, number in before.items():
                    setattr(layer, name, number)

        # The plugin's method inherits what calls it.
        monkeypatch.setattr(modelopt, "make_nvfp4_moe_quant_config", told)

        others = {name.removeprefix("swiglu_"): number for name, number in numbers.items()}

        for kernels in KERNELS.values():
            run = kernels.run

            def run_with(
                x: Any,
                experts: Any,
                ids: Any,
                weights: Any,
                gate: Any,
                *,
                run: Any = run,
                **more: Any,
            ) -> Any:
                return run(x, experts, ids, weights, replace(gate, **others), **more)

            monkeypatch.setattr(kernels, "run", run_with)

    return change


def before_conversion(damage: Callable[[Any], None]) -> Callable[[MonkeyPatch], None]:
    """The conversion gets the weights wrong."""

    def change(monkeypatch: MonkeyPatch) -> None:
        from vllm.model_executor.layers.quantization import modelopt

        from vllm_nvfp4_moe.backends import vllm_kernels
        from vllm_nvfp4_moe.backends.hopper.method import HopperMethod

        convert = vllm_kernels.convert_to_nvfp4_moe_kernel_format

        def broken(*, layer: Any, **more: Any) -> Any:
            damage(layer)
            return convert(layer=layer, **more)

        for module in (modelopt, vllm_kernels):
            monkeypatch.setattr(module, "convert_to_nvfp4_moe_kernel_format", broken)

        prepare = HopperMethod.prepare

        def prepare_broken(self: HopperMethod, layer: Any) -> None:
            damage(layer)
            prepare(self, layer)

        monkeypatch.setattr(HopperMethod, "prepare", prepare_broken)

    return change


def swap_halves(layer: Any) -> None:
    for tensor in (layer.w13_weight.data, layer.w13_weight_scale.data.view(torch.uint8)):
        half = tensor.shape[1] // 2
        first = tensor[:, :half].clone()
        tensor[:, :half] = tensor[:, half:]
        tensor[:, half:] = first


def shift_scales(layer: Any) -> None:
    scales = layer.w2_weight_scale.data.view(torch.uint8)
    scales.copy_(scales.roll(1, 2))


BREAKS = {
    "another alpha": other_numbers(swiglu_alpha=1.0),
    "another limit": other_numbers(swiglu_limit=1e6),
    "no beta": other_numbers(swiglu_beta=0.0),
    "gate and up swapped": before_conversion(swap_halves),
    "scales of other columns": before_conversion(shift_scales),
}


def unchecked(case: Case, backend: str, monkeypatch: MonkeyPatch) -> torch.Tensor:
    """What the kernels compute with what is broken at this time: vLLM's under its own method."""
    ours = backend.startswith("hopper")
    with monkeypatch.context() as patch:
        patch.setenv(settings.SELF_CHECK, "0")
        layer = build(case.shape, GATE, case.w13, case.w2, backend, stock=not ours)
    return layer.apply(*case.batches["16 uniform"][:3])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", BREAKS)
def test_what_is_broken_on_purpose(
    case: Case, backend: str, what: str, monkeypatch: MonkeyPatch
) -> None:
    skip_elsewhere(backend)
    right = unchecked(case, backend, monkeypatch)
    found = error(right, case.truth(GATE, "16 uniform")).whole
    assert found < ERROR.get(backend, 1e-2)
    BREAKS[what](monkeypatch)
    with pytest.raises(ValueError, match=f"self-check: {backend.upper()} .* does not compute"):
        build(case.shape, GATE, case.w13, case.w2, backend)
    # Stock vLLM says nothing, and computes something else: run twice, a kernel differs from itself
    # by less than a hundredth of this.
    assert error(unchecked(case, backend, monkeypatch), right.float()).whole > 0.015
