"""The name by which vLLM keeps a compiled graph, under settings that make another graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.compilation.caching import aot_compile_hash_factors
from vllm.config import VllmConfig

from vllm_nvfp4_moe import graphs, quirks, settings
from vllm_nvfp4_moe.backends.cpu import forward
from vllm_nvfp4_moe.backends.cpu.method import CpuMethod

Load = Callable[..., dict[str, Any]]


@pytest.fixture
def name(load: Load, shallow: dict[str, Path]) -> Callable[..., str]:
    """``name(**more)``: of the graph of a model that is loaded now. vLLM's own
    part is that of the same config each time."""
    config = VllmConfig()

    def of(**more: Any) -> str:
        load(shallow["modelopt"], **({"enforce_eager": False} | more))
        return str(aot_compile_hash_factors(config))

    return of


def test_the_same_settings_give_the_same_name(name: Callable[..., str]) -> None:
    assert name() == name()


def test_another_operator(name: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """``vllm_nvfp4_moe::experts`` in C++, and ``cpu_experts`` where numba computes."""
    first = name()
    monkeypatch.setenv(settings.CPP, "0")
    forward.native.cache_clear()
    try:
        assert name() != first
    finally:
        monkeypatch.undo()
        forward.native.cache_clear()
    assert name() == first


def test_constants_of_an_operator(
    name: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which kernel takes how many tokens is one, and comes from a saved table."""
    tables = ["4=numba;inf=numba", "8=numba;inf=numba"]
    found = []
    for table in tables:
        monkeypatch.setattr(CpuMethod, "by_tokens", table)
        found.append(name())
    assert found[0] != found[1]


def test_what_a_kernel_of_a_gpu_pads(
    name: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM traces the padding of a layer's input, to the kernel's size; on a CPU nothing is padded,
    and so a layer says here that it was."""
    first = name()
    prepare = CpuMethod.prepare

    def padded(self: CpuMethod, layer: Any) -> None:
        prepare(self, layer)
        layer.moe_config.hidden_dim += 128

    monkeypatch.setattr(CpuMethod, "prepare", padded)
    assert name() != first


def test_without_compilation_nothing_is_added(
    name: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(quirks.logger, "info_once", lambda text, *args: logged.append(text % args))
    before = graphs.part()
    name(enforce_eager=True)
    assert graphs.part() == before
    assert not [line for line in logged if quirks.KEPT_GRAPHS.name in line]
    name()
    assert [line for line in logged if quirks.KEPT_GRAPHS.name in line]


def test_a_graph_traces_what_the_name_tells(load: Load, shallow: dict[str, Path]) -> None:
    """That the operator is in the graph at all, and not hidden behind one of vLLM's."""
    from torch._dynamo.testing import EagerAndRecordGraphs

    model = load(shallow["modelopt"], enforce_eager=False)
    runner = next(each for key, each in model.items() if key != "model")
    experts = runner.routed_experts
    x = torch.zeros(2, experts.hidden_size, dtype=experts.params_dtype)
    weights, ids = torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32)
    record = EagerAndRecordGraphs()
    method = experts.quant_method

    @torch.compile(backend=record, fullgraph=True)
    def call(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = method.apply(experts, x, weights, ids, None, None)
        return found

    call(x)
    (graph,) = record.graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [target for target in called if "vllm_nvfp4_moe" in target]
