"""The check at load refuses a kernel that applies another gate than the contract's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace

import pytest

from quantize.experts.gates import Gate
from tests.plugin.conftest import Damage, Loader
from tests.plugin.stand_ins import LAYER, WRONG, apply_as

MonkeyPatch = pytest.MonkeyPatch


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kernel_that_applies_another_gate(
    load: Loader, shallow: dict, monkeypatch: MonkeyPatch, wrong: str
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
    load: Loader, damage: Callable[[str], Damage], monkeypatch: MonkeyPatch, applied: Gate
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
