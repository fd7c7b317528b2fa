"""One line a model at INFO says what runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.trained import Sizes

Load = Callable[..., dict[str, Any]]
LAYER = "model.layers.1.mlp.experts"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from vllm_nvfp4_moe import summary

    found: list[str] = []
    # Not by a handler: importing vLLM's modules configures logging again.
    monkeypatch.setattr(
        summary.logger, "info_once", lambda text, *args, scope: found.append(text % args)
    )
    return found


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_of_a_model(load: Load, quantized: dict[str, Path], layout: str, lines: list[str]) -> None:
    load(quantized[layout])
    (line,) = lines
    sizes = Sizes.of(quantized[layout])
    assert f"{len(sizes.sparse)} layers x {sizes.experts} experts, {layout} layout; " in line
    assert "gate swiglu_oai(alpha=1.702, beta=1, limit=7); kernel the CPU kernel; " in line
    gib = float(re.search(r"; (\d+\.\d+) GiB on this rank; \d+\.\d s; ", line)[1])
    assert gib == pytest.approx(sizes.expert_weights * 4.5 / 8 / 2**30, abs=0.01)
    assert re.search(r"self-check passed, relative error 0\.00\d+, \d+\.\d s$", line)


def test_on_the_fly(load: Load, shallow_bf16: Path, lines: list[str]) -> None:
    load(shallow_bf16)
    (line,) = lines
    assert "1 layers x 32 experts, quantized on the fly; gate swiglu_oai(" in line


def test_without_a_check(
    load: Load, shallow: dict, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVFP4_MOE_SELF_CHECK", "0")
    load(shallow["modelopt"])
    (line,) = lines
    assert line.endswith("; no self-check")


def test_why_nothing_faster(
    load: Load, shallow: dict, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_nvfp4_moe.backends.cpu.method import CpuMethod

    reasons = [("TRTLLM", "no such device"), ("HUMMING", "not installed")]
    monkeypatch.setattr(CpuMethod, "passed_over", reasons)
    load(shallow["modelopt"])
    (line,) = lines
    assert "; passed over: TRTLLM (no such device), HUMMING (not installed); " in line


def test_a_draft_model_of_the_same_config(load: Load, shallow: dict, lines: list[str]) -> None:
    """Its layers are built after the model's own are loaded; and reloading says nothing."""
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    summary = layer.quant_method.context.summary
    summary.built()
    summary.loaded(layer, layer.quant_method)
    assert len(lines) == 2
    assert all("1 layers x 32 experts" in line for line in lines)
    summary.loaded(layer, layer.quant_method)
    assert len(lines) == 2
