"""The check at load: silent on what is right, and a refusal for whatever would give wrong text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.native.jit import KernelError
from tests.plugin.conftest import Loader
from tests.plugin.stand_ins import LAYER
from vllm_nvfp4_moe import self_check
from vllm_nvfp4_moe.backends.cpu.method import CpuMethod
from vllm_nvfp4_moe.self_check import sample

MonkeyPatch = pytest.MonkeyPatch


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 6e-3)])
def test_a_right_kernel_passes(load: Loader, shallow: dict, dtype: str, error: float) -> None:
    for layout in shallow:
        check = load(shallow[layout], dtype=dtype)[
            LAYER
        ].routed_experts.quant_method.context.self_check
        assert check.skipped is None
        assert 0 < check.worst < error


def test_a_check_that_cannot_be_made_is_said(
    load: Loader, shallow: dict, monkeypatch: MonkeyPatch, caplog: pytest.LogCaptureFixture
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
    load: Loader, shallow: dict, monkeypatch: MonkeyPatch
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


KERNELS = ("forward", "expand")
"""The CPU's two with numba: loops for few tokens an expert, and what expands weights for many."""


@pytest.mark.usefixtures("numba")
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_kernel_that_a_backend_chooses_among(
    load: Loader, shallow: dict, monkeypatch: MonkeyPatch, kernel: str
) -> None:
    from vllm_nvfp4_moe.backends.cpu import kernels

    right = getattr(kernels, kernel)
    monkeypatch.setattr(kernels, kernel, lambda *args: right(*args) * 1.05)
    with pytest.raises(ValueError, match="self-check: the CPU kernel does not compute what"):
        load(shallow["modelopt"])


def test_a_row_that_is_wrong_among_many_alone(
    load: Loader, shallow: dict, monkeypatch: MonkeyPatch
) -> None:
    apply = CpuMethod.apply

    def last_row(self: CpuMethod, *args: Any) -> torch.Tensor:
        output = apply(self, *args)
        output[sample.TOKENS :] *= 1.1
        return output

    monkeypatch.setattr(CpuMethod, "apply", last_row)
    with pytest.raises(ValueError, match=r"of 32 token.*: relative error 0\.(09|10)"):
        load(shallow["modelopt"])


def test_a_kernel_that_cannot_run(load: Loader, shallow: dict, monkeypatch: MonkeyPatch) -> None:
    """No traceback, and no server that fails at its first request."""

    def fail(*_: Any) -> None:
        raise KernelError("CUDA error 700: an illegal memory access\nwas encountered")

    monkeypatch.setattr(self_check, "run_alone", fail)
    with pytest.raises(ValueError, match=r"self-check: the CPU kernel cannot run here: .* access"):
        load(shallow["modelopt"])


def test_a_device_that_a_kernel_broke(
    load: Loader, shallow: dict, monkeypatch: MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        monkeypatch.setattr(self_check, "_device_works", lambda layer: False)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(self_check, "run_alone", fail)
    with pytest.raises(ValueError, match=r"self-check: the CPU kernel cannot run here: Runtime"):
        load(shallow["modelopt"])


def test_what_kernels_keep_is_not_allocated_during_the_check(
    load: Loader, shallow: dict, monkeypatch: MonkeyPatch
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
    load: Loader, quantized: dict[str, Path], monkeypatch: MonkeyPatch
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
