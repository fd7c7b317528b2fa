"""The check at load of kernels that route tokens by themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.plugin.conftest import Damage, Loader
from tests.plugin.stand_ins import LAYER, Routes

MonkeyPatch = pytest.MonkeyPatch


def test_a_kernel_that_routes(load: Loader, shallow: dict, monkeypatch: MonkeyPatch) -> None:
    routes = Routes(monkeypatch, -torch.inf, False)
    check = load(shallow["modelopt"])[LAYER].routed_experts.quant_method.context.self_check
    assert check.skipped is None
    assert 0 < check.worst < 6e-3
    logits = torch.cat(routes.logits)
    assert (logits < 0).all(1).any()
    ties = [len(row.unique()) == 2 for row in logits]
    assert any(ties) and not all(ties)


def test_a_router_that_prepares_logits(
    load: Loader, shallow: dict, monkeypatch: MonkeyPatch
) -> None:
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


def test_a_router_that_throws_dice(load: Loader, shallow: dict, monkeypatch: MonkeyPatch) -> None:
    """vLLM's option for measuring speed; serving goes on."""
    Routes(monkeypatch, -torch.inf, False)
    monkeypatch.setenv("VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random")
    check = load(shallow["modelopt"])[LAYER].routed_experts.quant_method.context.self_check
    assert "experts are chosen at random" in check.skipped


@pytest.mark.parametrize(("floor", "first_of_equals"), [(0.0, False), (-torch.inf, True)])
def test_a_kernel_that_routes_wrong(
    load: Loader,
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
