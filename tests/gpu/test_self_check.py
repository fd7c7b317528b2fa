"""The check at load with vLLM's kernels and our own: silent where they are right, and a stop where
a gate or a conversion was broken on purpose, which stock vLLM serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gpu.broken import before_conversion, other_numbers, shift_scales, swap_halves
from tests.gpu.layer import Case, Shape, build, error, skip_elsewhere
from vllm_nvfp4_moe import self_check, settings

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
