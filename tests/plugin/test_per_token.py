"""Activations in NVFP4 with a scale for each token, as ``--quantization-config`` asks for them.

vLLM's own method for ModelOpt's NVFP4 experts is the judge: what it hands to the conversion and to
the kernel of the same files. The kernel itself (TRT-LLM's, on Blackwell) was never run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.quantization import modelopt
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    kNvfp4DynamicToken,
    kNvfp4Static,
)

from quantize.experts.gates import Gate
from quantize.nvfp4.activations import round_nvfp4_rows
from tests.plugin.blackwell import GELU, M3, RELU2, SILU, moe_config, pretend
from tests.plugin.stand_ins import round_activations, rounded
from vllm_nvfp4_moe.backends import vllm_kernels
from vllm_nvfp4_moe.backends.cpu.method import CpuMethod
from vllm_nvfp4_moe.backends.selection import Selection, select
from vllm_nvfp4_moe.errors import RefusedError

LAYER = "model.layers.1.mlp.experts"
ASKED = {"quantization_config": {"moe": {"activation": "nvfp4_per_token"}}}
Load = Callable[..., dict[str, Any]]
Seen = dict[str, dict[str, Any]]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """What the conversion and the kernel are given, by the plugin's method and by vLLM's, with
    TRT-LLM chosen."""
    found: Seen = {}
    experts: Any = SimpleNamespace(is_monolithic=lambda: False, __name__="Stub")
    backend = NvFp4MoeBackend.FLASHINFER_TRTLLM

    def choose(*, weight_key: Any, activation_key: Any, **_: Any) -> tuple[Any, Any]:
        found["keys"] = {"weight": weight_key, "activation": activation_key}
        return backend, experts

    def ours(config: Any, weight_key: Any, activation_key: Any, *_: Any) -> Selection:
        return Selection(*choose(weight_key=weight_key, activation_key=activation_key), [])

    def convert(**given: Any) -> tuple[torch.Tensor | None, ...]:
        found["convert"] = {
            name: each.detach().clone() if isinstance(each, torch.Tensor) else each
            for name, each in given.items()
            if name != "layer"
        }
        names = ("", "_scale", "_scale_2")
        w13, w2 = ([given[f"{w}{n}"] for n in names] for w in ("w13", "w2"))
        return (*w13, given["a13_scale"], *w2, given["a2_scale"])

    def kernel(**given: Any) -> SimpleNamespace:
        found["kernel"] = given
        after = SimpleNamespace(process_weights_after_loading=lambda layer: None)
        return SimpleNamespace(fused_experts=after, is_monolithic=False)

    for module in (vllm_kernels, modelopt):
        monkeypatch.setattr(module, "convert_to_nvfp4_moe_kernel_format", convert)
    monkeypatch.setattr(vllm_kernels, "select", ours)
    monkeypatch.setattr(modelopt, "select_nvfp4_moe_backend", choose)
    monkeypatch.setattr(modelopt, "make_nvfp4_moe_kernel", kernel)
    monkeypatch.setenv("NVFP4_MOE_SELF_CHECK", "0")  # nothing computes here
    method = vllm_kernels.VllmKernelsMethod
    monkeypatch.setattr(method, "unsupported", classmethod(lambda cls, layer: None))
    return found


def weights_only(damage: Callable, layout: str) -> Path:
    """A checkpoint without input scales, as the command writes it by default."""

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "input_scale" in n or "input_global_scale" in n]:
            del tensors[name]

    def say(config: dict[str, Any]) -> None:
        config["quantization_config"]["quant_algo"] = "W4A16_NVFP4"
        for group in config["quantization_config"]["config_groups"].values():
            group["input_activations"] = None

    copy = damage(layout)
    copy.tensors(drop)
    return copy.config(say)


def test_it_is_passed_on_as_vllm_does(
    load: Load, shallow: dict[str, Path], damage: Callable, seen: Seen
) -> None:
    load(shallow["modelopt"], "modelopt_fp4", **ASKED)
    stock = {name: dict(each) for name, each in seen.items()}
    assert stock["keys"]["activation"] == kNvfp4DynamicToken
    assert stock["kernel"]["per_token_activation"] is True
    # Neither layout nor input scales matter: the kernel computes its own.
    for folder in (
        shallow["modelopt"],
        shallow["compressed-tensors"],
        weights_only(damage, "modelopt"),
        weights_only(damage, "compressed-tensors"),
    ):
        seen.clear()
        layer = load(folder, **ASKED)[LAYER].routed_experts
        assert seen["keys"] == stock["keys"]
        assert seen["kernel"]["per_token_activation"] is True
        mine, theirs = seen["convert"], stock["convert"]
        for name in ("a13_scale", "a2_scale"):  # of which vLLM takes the largest
            assert mine[name].max() == mine[name].min() == theirs[name].max() == 1
        for name in ("w13", "w2", "w13_scale", "w2_scale"):
            assert torch.equal(mine[name].view(torch.uint8), theirs[name].view(torch.uint8))
        for name in ("is_act_and_mul", "use_a16", "trtllm_hidden_alignment"):
            assert mine[name] == theirs[name], name
        assert layer.quant_method.quantizes_activations
        assert layer.quant_method.kernel == "FLASHINFER_TRTLLM (Stub, a scale for each token)"


def test_without_being_asked_for_nothing_changes(
    load: Load, shallow: dict[str, Path], seen: Seen
) -> None:
    load(shallow["modelopt"], "modelopt_fp4")
    stock = {name: dict(each) for name, each in seen.items()}
    load(shallow["modelopt"])
    assert seen["keys"] == stock["keys"]
    assert seen["kernel"]["per_token_activation"] is False
    assert stock["kernel"]["per_token_activation"] is False
    assert seen["convert"]["trtllm_hidden_alignment"] == 256
    assert torch.equal(seen["convert"]["a2_scale"], stock["convert"]["a2_scale"])


def test_activations_stay_if_the_user_says_so(
    load: Load, shallow: dict[str, Path], damage: Callable, seen: Seen, monkeypatch: Any
) -> None:
    """vLLM's own choice for the same weights without input scales is the judge."""
    load(weights_only(damage, "modelopt"), "modelopt_fp4")
    stock = {name: dict(each) for name, each in seen.items()}
    assert stock["keys"]["activation"] is None
    assert stock["convert"]["use_a16"] is True
    seen.clear()
    monkeypatch.setenv("NVFP4_MOE_ACTIVATIONS", "bf16")
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    assert seen["keys"] == stock["keys"]
    assert seen["convert"]["use_a16"] is True
    assert not layer.quant_method.quantizes_activations
    with pytest.raises(ValueError, match="contradict each other; leave one out"):
        load(shallow["modelopt"], **ASKED)


def test_four_over_six_is_said(
    load: Load, shallow: dict[str, Path], seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHINFER_NVFP4_4OVER6", "1")
    method = load(shallow["modelopt"], **ASKED)[LAYER].routed_experts.quant_method
    assert method.kernel == "FLASHINFER_TRTLLM (Stub, a scale for each token, four over six)"
    # Without a scale for each token, TRT-LLM's kernels do not do it.
    method = load(shallow["modelopt"])[LAYER].routed_experts.quant_method
    assert method.kernel == "FLASHINFER_TRTLLM (Stub)"
    method.nvfp4_backend = NvFp4MoeBackend.FLASHINFER_CUTLASS
    assert method.kernel == "FLASHINFER_CUTLASS (Stub, four over six)"


@pytest.mark.parametrize("gate", [SILU, M3, RELU2], ids=str)
@pytest.mark.parametrize("capability", [(10, 0), (10, 3)], ids=str)
def test_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, gate: Gate, capability: tuple[int, int]
) -> None:
    pretend(monkeypatch, capability)
    found = select(moe_config(gate), kNvfp4Static, kNvfp4DynamicToken, gate)
    assert found.backend == NvFp4MoeBackend.FLASHINFER_TRTLLM


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0), (12, 1)], ids=str)
def test_where_it_does_not(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """vLLM chooses kernels that would not do it, and then stops; so does the plugin."""
    for device, gate in ((capability, SILU), ((10, 0), GELU)):
        pretend(monkeypatch, device)
        found = select(moe_config(gate), kNvfp4Static, kNvfp4DynamicToken, gate)
        assert found.backend != NvFp4MoeBackend.FLASHINFER_TRTLLM


def test_our_own_kernels_do_not_take_the_place(load: Load, shallow: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="CpuMethod: --quantization-config asks for activations"):
        load(shallow["modelopt"], **ASKED)


@pytest.mark.parametrize("backend", ["MARLIN", "FLASHINFER_CUTEDSL"])
def test_another_kernel_of_vllm_is_refused(
    load: Load,
    shallow: dict[str, Path],
    seen: Seen,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    experts: Any = SimpleNamespace(is_monolithic=lambda: False, __name__="Stub")
    other = NvFp4MoeBackend(backend)
    monkeypatch.setattr(vllm_kernels, "select", lambda *_: Selection(other, experts, []))
    monkeypatch.setattr(modelopt, "select_nvfp4_moe_backend", lambda **_: (other, experts))
    with pytest.raises(ValueError, match="requires the FlashInfer TRTLLM MoE backend"):
        load(shallow["modelopt"], "modelopt_fp4", **ASKED)
    with pytest.raises(ValueError, match=f"on FLASHINFER_TRTLLM alone, and {backend}"):
        load(shallow["modelopt"], **ASKED)


def test_rows_are_rounded_as_by_vllm_with_scales_of_their_own() -> None:
    torch.manual_seed(0)
    x = torch.randn(7, 96) * torch.logspace(-6, 5, 7).unsqueeze(1)
    x[3] = 0
    x[4, :16] = 0
    found = round_nvfp4_rows(x)
    for row, own in zip(x, found, strict=True):
        # FlashInfer's quantization.cuh: rowAmax * globalScaleInv, of which 448 * 6 is the inverse.
        scale = row.abs().max() / (448 * 6) if row.any() else torch.tensor(1.0)
        torch.testing.assert_close(own, rounded(row[None], scale)[0], rtol=1e-6, atol=0)
    # No row's error is above what a block of 16 loses, however small the row.
    assert ((found - x).norm(dim=1) <= 0.15 * x.norm(dim=1)).all()


@pytest.mark.parametrize("kernel", ["right", "one scale for all"])
def test_the_self_check_knows_of_it(
    load: Load, damage: Callable, monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    """A kernel that rounds by the checkpoint's input scales, far too small here, is found out."""

    def small(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.endswith("input_scale")]:
            tensors[name].fill_(1e-6)

    round_activations(monkeypatch, None, by_row=kernel == "right")
    monkeypatch.setattr(CpuMethod, "per_token_activation", True)
    folder = damage("modelopt").tensors(small)
    if kernel == "right":
        check = load(folder)[LAYER].routed_experts.quant_method.context.self_check
        assert check.skipped is None
        assert 0 < check.worst < 0.2
    else:
        with pytest.raises(RefusedError, match="does not compute what the checkpoint means"):
            load(folder)
