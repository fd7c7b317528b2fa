"""One line a model at INFO says what runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trained import Sizes

Load = Callable[..., dict[str, Any]]
LAYER = "model.layers.1.mlp.experts"


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_of_a_model(
    load: Load, quantized: dict[str, Path], layout: str, summary_lines: list[str]
) -> None:
    load(quantized[layout])
    (line,) = summary_lines
    sizes = Sizes.of(quantized[layout])
    assert f"{len(sizes.sparse)} layers x {sizes.experts} experts, {layout} layout; " in line
    assert "gate swiglu_oai(alpha=1.702, beta=1, limit=7); kernel the CPU kernel; " in line
    gib = float(re.search(r"; (\d+\.\d+) GiB on this rank; \d+\.\d s; ", line)[1])
    assert gib == pytest.approx(sizes.expert_weights * 4.5 / 8 / 2**30, abs=0.01)
    assert re.search(r"self-check passed, relative error 0\.00\d+, \d+\.\d s$", line)


def test_on_the_fly(load: Load, shallow_bf16: Path, summary_lines: list[str]) -> None:
    load(shallow_bf16)
    (line,) = summary_lines
    assert "1 layers x 32 experts, quantized on the fly; gate swiglu_oai(" in line


def test_without_a_check(
    load: Load, shallow: dict, summary_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVFP4_MOE_SELF_CHECK", "0")
    load(shallow["modelopt"])
    (line,) = summary_lines
    assert line.endswith("; no self-check")


def test_why_nothing_faster(
    load: Load, shallow: dict, summary_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_nvfp4_moe.backends.cpu.method import CpuMethod

    reasons = [("TRTLLM", "no such device"), ("HUMMING", "not installed")]
    monkeypatch.setattr(CpuMethod, "passed_over", reasons)
    load(shallow["modelopt"])
    (line,) = summary_lines
    assert "; passed over: TRTLLM (no such device), HUMMING (not installed); " in line


def test_ranks_that_run_other_kernels(
    load: Load, shallow: dict, summary_lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 has logged the line, and here comes rank 1."""
    from vllm_nvfp4_moe import summary

    layer = load(shallow["modelopt"])[LAYER].routed_experts
    mine = layer.quant_method.context.summary
    store = torch.distributed.HashStore()
    warnings: list[str] = []
    own_lines: list[str] = []
    monkeypatch.setattr(summary.logger, "info", lambda text, *a: own_lines.append(text % a))
    monkeypatch.setattr(summary.logger, "warning", lambda text, *a: warnings.append(text % a))
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(distributed.distributed_c10d, "_get_default_store", lambda: store)

    def rank(number: int) -> None:
        monkeypatch.setattr(distributed, "get_rank", lambda: number)
        mine.built()
        mine.loaded(layer, layer.quant_method)

    rank(0)
    rank(2)
    assert warnings == []
    monkeypatch.setattr(layer.quant_method, "passed_over", [("HOPPER", "no nvcc")])
    rank(1)
    ran = f"[{layer.quant_method.variant}]"
    assert warnings == [
        "Ranks run different kernels for NVFP4 experts. Rank 1: kernel the CPU kernel; passed "
        f"over: HOPPER (no nvcc) {ran}. Rank 0: kernel the CPU kernel {ran}"
    ]
    (line,) = own_lines
    assert line.startswith("Rank 1: NVFP4 experts: 1 layers x 32 experts, ")
    assert "; passed over: HOPPER (no nvcc); " in line
    # The same kernel in another form: a processor with other instructions.
    monkeypatch.setattr(type(layer.quant_method), "variant", "some other")
    monkeypatch.setattr(layer.quant_method, "passed_over", [])
    rank(3)
    assert warnings[1].endswith(
        f"kernel the CPU kernel [some other]. Rank 0: kernel the CPU kernel {ran}"
    )


def test_a_draft_model_of_the_same_config(
    load: Load, shallow: dict, summary_lines: list[str]
) -> None:
    """Its layers are built after the model's own are loaded; and reloading says nothing."""
    layer = load(shallow["modelopt"])[LAYER].routed_experts
    summary = layer.quant_method.context.summary
    summary.built()
    summary.loaded(layer, layer.quant_method)
    assert len(summary_lines) == 2
    assert all("1 layers x 32 experts" in line for line in summary_lines)
    summary.loaded(layer, layer.quant_method)
    assert len(summary_lines) == 2
