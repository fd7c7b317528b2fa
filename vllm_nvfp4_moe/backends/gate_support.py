"""Which gates vLLM's NVFP4 kernels really apply; docs/operators/backends.md has the places.

vLLM asks a kernel about an activation's name alone. Some kernels answer yes and then apply another
formula, fixed numbers, or swapped halves. The table here lists what was read in their source, so a
backend whose source nobody has read counts as applying nothing.

A new form of gate gets a line for each backend whose kernels were read to apply it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vllm_nvfp4_moe.activation import STEP_LIMIT

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend

    from quantize.experts.gates import Gate

_Rule = Callable[["Gate"], str | None]
"""A function that says why a backend does not apply a form with a gate's numbers; None if it
does."""


def _exactly(gate: Gate) -> str | None:
    return None


def _limited(gate: Gate) -> str | None:
    if gate.limit is None:
        return "its kernels apply swiglu_oai only with a limit, and the checkpoint's has none"
    return None


def _step(gate: Gate) -> str | None:
    if gate.limit != STEP_LIMIT:
        return f"its kernels clamp swiglu_step at {STEP_LIMIT:g}, and the checkpoint says {gate}"
    return None


def _both_caps(gate: Gate) -> str | None:
    if gate.limit is None:
        return "its kernels apply situ only with a limit, and the checkpoint's has none"
    return None


def _kimi_k3(gate: Gate) -> str | None:
    if (gate.alpha, gate.limit) != (4.0, 25.0):
        return f"its kernels know situ with alpha 4 and limit 25 alone; the checkpoint says {gate}"
    return None


def _never(reason: str) -> _Rule:
    return lambda gate: reason


_ELEMENTWISE: dict[str, _Rule] = {
    "silu": _exactly,
    "swiglu_oai": _limited,
    "swiglu_step": _step,
    "gelu": _exactly,
    "gelu_tanh": _exactly,
    "relu2": _exactly,
    "situ": _exactly,
}
"""For backends whose GEMMs leave the gate to vLLM's own elementwise kernels. Humming has kernels
with the same formulas."""

_APPLIES: dict[str, dict[str, _Rule]] = {
    "FLASHINFER_TRTLLM": {
        "silu": _exactly,
        "swiglu_oai": _exactly,
        "gelu": _never("its only GeGLU is the approximation by tanh, not exact GELU"),
        "gelu_tanh": _exactly,
        "relu2": _exactly,
        "situ": _both_caps,
    },
    "FLASHINFER_CUTEDSL": {
        "silu": _exactly,
        "swiglu_oai": _exactly,
        "relu2": _exactly,
        "situ": _exactly,
    },
    "FLASHINFER_CUTEDSL_BATCHED": {"silu": _exactly},
    "FLASHINFER_CUTLASS": {
        "silu": _exactly,
        "swiglu_oai": _exactly,
        "gelu_tanh": _never("vLLM asks it for Geglu, which in its kernels is exact GELU"),
        "relu2": _exactly,
    },
    "FLASHINFER_B12X": {"silu": _exactly, "gelu_tanh": _exactly, "relu2": _exactly},
    "FLASHINFER_MOE_EP_CUTEDSL": {"silu": _exactly},
    "B12X": {
        "silu": _exactly,
        "swiglu_oai": _never("vLLM hands it up before gate, and for this gate it reads gate first"),
        "relu2": _exactly,
        "situ": _kimi_k3,
    },
    "VLLM_CUTLASS": _ELEMENTWISE,
    "MARLIN": _ELEMENTWISE,
    "HUMMING": _ELEMENTWISE,
    "EMULATION": _ELEMENTWISE,
}
"""By vLLM's name of the backend, the forms that its kernels apply."""


def drops(backend: NvFp4MoeBackend, gate: Gate) -> str | None:
    """Why ``backend`` would not apply ``gate`` with just its numbers, None if it would.

    Args:
        backend: one of vLLM's. All its experts classes share the kernels that matter here.
        gate: the contract's, for gate and up that are stored one after the other.
    """
    forms = _APPLIES.get(backend.value)
    if forms is None:
        return "nobody has read which gates it applies"
    if gate.form not in forms:
        return f"its kernels do not apply {gate.form}"
    return forms[gate.form](gate)
