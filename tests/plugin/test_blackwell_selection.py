"""Which of vLLM's kernels run where, with the device, FlashInfer and Humming pretended.

``CHOICES`` was derived by reading vLLM 0.32 (docs/operators/backends.md has the places), not from
its output.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.fused_moe.oracle import nvfp4
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.quantization.utils.quant_utils import kNvfp4Dynamic, kNvfp4Static

from quantize.experts.gates import Gate
from tests.plugin.blackwell import (
    GELU,
    GELU_TANH,
    M3,
    PARALLEL,
    RELU2,
    SILU,
    SITU,
    STEP,
    moe_config,
    pretend,
)
from vllm_nvfp4_moe import quirks
from vllm_nvfp4_moe.backends.gate_support import drops
from vllm_nvfp4_moe.backends.selection import Selection, select

MONOLITHIC = ("FLASHINFER_TRTLLM", "TrtLlmNvFp4ExpertsMonolithic")
MODULAR = ("FLASHINFER_TRTLLM", "TrtLlmNvFp4ExpertsModular")
BATCHED = ("FLASHINFER_CUTEDSL_BATCHED", "FlashInferCuteDSLBatchedExperts")
FI_CUTLASS = ("FLASHINFER_CUTLASS", "FlashInferExperts")
CUTLASS = ("VLLM_CUTLASS", "CutlassExpertsFp4")
MARLIN = ("MARLIN", "MarlinExperts")
INDEXED = ("HUMMING", "HummingIndexedExperts")
GROUPED = ("HUMMING", "HummingGroupedExperts")
NONE = None

# By parallel mode, in the order of PARALLEL: single, TP2, EP2, DP2+EP, deepep_ht, deepep_ll, EPLB.
# TRT-LLM's class with its own router wants neither all-to-all nor EPLB; vLLM's CUTLASS does not
# take deepep_ht; deepep_ll wants a class for batched activations, of which there are FlashInfer's
# (SiLU alone, W4A4, 10.x) and Humming's (asked for by VLLM_HUMMING_MOE_GEMM_TYPE alone).
TRTLLM = (MONOLITHIC, MONOLITHIC, MONOLITHIC, MODULAR, MODULAR, NONE, MODULAR)
TRTLLM_SILU = (*TRTLLM[:5], BATCHED, MODULAR)
ALL_CUTLASS = (CUTLASS, CUTLASS, CUTLASS, CUTLASS, MARLIN, NONE, CUTLASS)
ALL_FI_CUTLASS = (*(FI_CUTLASS,) * 5, NONE, FI_CUTLASS)
ALL_MARLIN = (*(MARLIN,) * 5, NONE, MARLIN)
# Humming: one kernel without expert parallelism, another with. It comes before Marlin on 9.0 only.
HUMMING = (INDEXED, INDEXED, GROUPED, GROUPED, GROUPED, NONE, GROUPED)

# On 10.x: TRT-LLM does GELU by tanh alone, so exact GELU goes on to vLLM's CUTLASS.
FAMILY_100 = {
    SILU: TRTLLM_SILU,
    M3: TRTLLM,
    STEP: ALL_CUTLASS,
    GELU: ALL_CUTLASS,
    GELU_TANH: TRTLLM,
    RELU2: TRTLLM,
    SITU: TRTLLM,
}
# On 12.x: no TRT-LLM, no CuteDSL; FlashInfer's CUTLASS would do exact GELU for GELU by tanh.
FAMILY_120 = {
    SILU: ALL_FI_CUTLASS,
    M3: ALL_FI_CUTLASS,
    STEP: ALL_CUTLASS,
    GELU: ALL_CUTLASS,
    GELU_TANH: ALL_CUTLASS,
    RELU2: ALL_FI_CUTLASS,
    SITU: ALL_CUTLASS,
}
GATES = tuple(FAMILY_100)

# Nothing quantizes activations on 9.0; nothing of FlashInfer's or CUTLASS's leaves them alone.
CHOICES: dict[tuple[int, int], tuple[dict[Gate, Any], dict[Gate, Any]]] = {
    (9, 0): (dict.fromkeys(GATES, HUMMING), dict.fromkeys(GATES, HUMMING)),
    (10, 0): (FAMILY_100, dict.fromkeys(GATES, ALL_MARLIN)),
    (10, 3): (FAMILY_100, dict.fromkeys(GATES, ALL_MARLIN)),
    (12, 0): (FAMILY_120, dict.fromkeys(GATES, ALL_MARLIN)),
    (12, 1): (FAMILY_120, dict.fromkeys(GATES, ALL_MARLIN)),
}
"""By capability: of W4A4, of W4A16 checkpoints. ModelOpt's and compressed-tensors' layouts give
vLLM the same keys (tests/plugin/test_vllm_kernels.py)."""

ACTIVATIONS = {"W4A4": kNvfp4Dynamic, "W4A16": None}


def choose(gate: Gate, activation: str = "W4A4", **config: Any) -> Selection:
    return select(moe_config(gate, **config), kNvfp4Static, ACTIVATIONS[activation], gate)


@pytest.mark.parametrize("capability", CHOICES, ids=str)
@pytest.mark.parametrize("gate", GATES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_choice(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], gate: Gate, activation: str
) -> None:
    pretend(monkeypatch, capability)
    want = CHOICES[capability][activation == "W4A16"][gate]
    for parallel, expected in zip(PARALLEL, want, strict=True):
        if expected is None:
            with pytest.raises(ValueError, match=r"no NVFP4 kernels.*Asked: .*FLASHINFER_TRTLLM"):
                choose(gate, activation, parallel=parallel)
            continue
        found = choose(gate, activation, parallel=parallel)
        assert (found.backend.value, found.experts_cls.__name__) == expected, parallel
        # Where no gate is at issue, it is vLLM's own choice.
        theirs = nvfp4.select_nvfp4_moe_backend(
            moe_config(gate, parallel), kNvfp4Static, ACTIVATIONS[activation]
        )
        assert theirs == (found.backend, found.experts_cls) or drops(theirs[0], gate)


@pytest.mark.parametrize("capability", CHOICES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_where_the_routers_weight_is_for_the_input(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], activation: str
) -> None:
    """As in Llama 4. The plugin weighs tokens before any kernel, so that all but those that route
    by themselves can be had; of these TRT-LLM's asks about the way of routing."""
    pretend(monkeypatch, capability)
    found = select(moe_config(SILU), kNvfp4Static, ACTIVATIONS[activation], SILU, True)
    as_usual = choose(SILU, activation)
    assert (found.backend, found.experts_cls) == (as_usual.backend, as_usual.experts_cls)
    monkeypatch.setattr(found.experts_cls, "is_monolithic", staticmethod(lambda: True))
    other = select(moe_config(SILU), kNvfp4Static, ACTIVATIONS[activation], SILU, True)
    passed_over = [name for name, why in other.passed_over if "route by themselves" in why]
    assert bool(passed_over) == (found.backend.value != "FLASHINFER_TRTLLM")


ORDER = [
    "FLASHINFER_TRTLLM", "FLASHINFER_CUTEDSL", "FLASHINFER_CUTEDSL_BATCHED", "FLASHINFER_CUTLASS",
    "VLLM_CUTLASS", "MARLIN", "HUMMING", "EMULATION",
]  # fmt: skip
"""vLLM's, on everything but 9.0 (oracle/nvfp4.py)."""


def test_every_faster_one_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (12, 0))
    # W4A16 on 12.x ends at Marlin: everything before it, in order, with a reason of its own.
    passed_over = dict(choose(M3, "W4A16").passed_over)
    assert list(passed_over) == ORDER[:5]
    assert passed_over["FLASHINFER_TRTLLM"] == "kernel does not support compute capability 12.0"
    assert "do not clamp" in passed_over["FLASHINFER_CUTEDSL_BATCHED"]  # vLLM does not ask it
    assert "quantization scheme" in passed_over["VLLM_CUTLASS"]
    # An objection of ours.
    passed_over = dict(choose(GELU_TANH).passed_over)
    assert list(passed_over) == ORDER[:4]
    assert "exact GELU" in passed_over["FLASHINFER_CUTLASS"]
    # One class of a backend passed over for another of its classes.
    pretend(monkeypatch, (10, 0))
    ((name, reason),) = choose(M3, parallel="DP2+EP").passed_over
    assert name == "FLASHINFER_TRTLLM TrtLlmNvFp4ExpertsMonolithic"
    assert "parallel config" in reason
    assert choose(M3).passed_over == []


CLAMPED_SILU = Gate("swiglu_oai", alpha=1.0, beta=0.0, limit=10.0)
UNLIMITED = Gate("swiglu_oai", alpha=1.702, beta=1.0)
STEP_5 = Gate("swiglu_step", limit=5.0)
STEP_UNLIMITED = Gate("swiglu_step")
SITU_OTHER = Gate("situ", alpha=2.0, limit=10.0)
SITU_UNCAPPED = Gate("situ", alpha=4.0)
SITUS = {SITU, SITU_OTHER, SITU_UNCAPPED}

# Of each backend, the gates it was read to apply (docs/operators/backends.md has the lines).
ELEMENTWISE = {SILU, M3, CLAMPED_SILU, STEP, GELU, GELU_TANH, RELU2, *SITUS}
APPLIED = {
    "FLASHINFER_TRTLLM": {SILU, M3, CLAMPED_SILU, UNLIMITED, GELU_TANH, RELU2, SITU, SITU_OTHER},
    "FLASHINFER_CUTEDSL": {SILU, M3, CLAMPED_SILU, UNLIMITED, RELU2, *SITUS},
    "FLASHINFER_CUTEDSL_BATCHED": {SILU},
    "FLASHINFER_CUTLASS": {SILU, M3, CLAMPED_SILU, UNLIMITED, RELU2},
    "FLASHINFER_B12X": {SILU, GELU_TANH, RELU2},
    "FLASHINFER_MOE_EP_CUTEDSL": {SILU},
    "B12X": {SILU, RELU2, SITU},
    "VLLM_CUTLASS": ELEMENTWISE,
    "MARLIN": ELEMENTWISE,
    "HUMMING": ELEMENTWISE,
    "EMULATION": ELEMENTWISE,
}
ASKED_FOR = {
    "FLASHINFER_TRTLLM": "flashinfer_trtllm",
    "FLASHINFER_CUTEDSL": "flashinfer_cutedsl",
    "FLASHINFER_CUTLASS": "flashinfer_cutlass",
    "FLASHINFER_B12X": "flashinfer_b12x",
    "FLASHINFER_MOE_EP_CUTEDSL": "flashinfer_moe_ep_cutedsl",
    "B12X": "b12x",
    "VLLM_CUTLASS": "cutlass",
    "MARLIN": "marlin",
    "HUMMING": "humming",
    "EMULATION": "emulation",
}
"""``--moe-backend``, of the backends that have a name of their own there."""


@pytest.mark.parametrize("backend", ASKED_FOR)
def test_a_gate_that_the_requested_backend_does_not_apply_is_refused(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    vllm_config = VllmConfig()  # which FlashInfer's megakernel wants, with expert parallelism
    parallel = "EP2" if backend == "FLASHINFER_MOE_EP_CUTEDSL" else "single"
    pretend(monkeypatch, (12, 0) if "B12X" in backend else (10, 0))
    accepted = set()
    gates = (
        *(SILU, M3, CLAMPED_SILU, UNLIMITED, STEP, STEP_5, STEP_UNLIMITED, GELU, GELU_TANH, RELU2),
        *SITUS,
    )
    for gate, activation in itertools.product(gates, ACTIVATIONS):
        with set_current_vllm_config(vllm_config):
            try:
                found = choose(gate, activation, parallel=parallel, moe_backend=ASKED_FOR[backend])
            except ValueError as error:
                assert str(gate) in str(error)
                continue
        assert found.backend.value == backend
        accepted.add(gate)
    assert accepted == APPLIED[backend]


def test_of_auto_selection_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In no mode anything is chosen for a gate that it was not read to apply."""
    gates = (CLAMPED_SILU, UNLIMITED, STEP_5, STEP_UNLIMITED, SITU_OTHER, SITU_UNCAPPED)
    for capability in CHOICES:
        pretend(monkeypatch, capability)
        for gate, parallel, activation in itertools.product(gates, PARALLEL, ACTIVATIONS):
            try:
                found = choose(gate, activation, parallel=parallel)
            except ValueError:
                continue
            assert gate in APPLIED[found.backend.value], (capability, parallel, activation)


def test_b12x_made_to_leave_activations_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then vLLM's class takes MiniMax-M3's gate, for which it would swap gate and up."""
    monkeypatch.setenv("VLLM_B12X_MOE_FP4_FORCE_A16", "1")
    pretend(monkeypatch, (12, 0))
    config = moe_config(M3, moe_backend="b12x")
    theirs, _ = nvfp4.select_nvfp4_moe_backend(config, kNvfp4Static, kNvfp4Dynamic)
    assert theirs == NvFp4MoeBackend.B12X
    with pytest.raises(ValueError, match="hands it up before gate"):
        choose(M3, moe_backend="b12x")


def test_unknown_backends_apply_nothing() -> None:
    class Tomorrow:
        value = "TOMORROW"

    backend: Any = Tomorrow()
    assert drops(backend, SILU) == "nobody has read which gates it applies"
    assert set(APPLIED) == {b.value for b in NvFp4MoeBackend}, "vLLM has others: read them"


def test_vllm_that_chooses_otherwise_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvfp4, "select_nvfp4_moe_backend", lambda *config: None)
    with pytest.raises(RuntimeError, match="cannot tell whether they apply the checkpoint's gate"):
        quirks.select_nvfp4_moe_backend(lambda backend: [])
