"""Weights are loaded again under captured CUDA graphs, which must then compute what a fresh load
computes: by vLLM's own reloading, from NVFP4 and from bf16, twice, and after each level of sleep.

Layers here take seconds each. ``test_engine`` starts one engine and takes minutes; leave it out by
``-k "not engine"``. It serves m3-nano where that is (``M3_NANO``), else the tests' own model.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.gpu.layer import Layer, Shape, batch, build, error, load, random_weights, skip_elsewhere
from tests.gpu.reference import Stored
from tests.gpu.test_layer import RERUN
from tests.hub_layout import publish
from tests.trained import nano, own_model

SHAPE = Shape("m3-nano", 32, 384, 128, 4)
GATE = "swiglu_oai"
BACKENDS = ("hopper", "hopper fp8", "humming", "marlin", "emulation")
TOKENS = (1, 16, 256)
Weights = tuple[Any, Any]


def weights(seed: int, device: torch.device, plain: bool) -> Weights:
    """w13 and w2, in NVFP4 or in bf16."""
    stored = random_weights(SHAPE, device, seed)
    return tuple(in_bf16(each) for each in stored) if plain else stored


def in_bf16(stored: Stored) -> torch.Tensor:
    every = range(len(stored.codes))
    return torch.stack([stored.weight(e, torch.float32) for e in every]).bfloat16()


def reload(layer: Layer, new: Weights) -> None:
    """As vLLM's worker does it for ``reload_weights``, without a current config."""
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    initialize_layerwise_reload(layer.runner)
    load(layer.experts, *new)
    finalize_layerwise_reload(layer.runner, SimpleNamespace(dtype=torch.bfloat16))


def held(layer: Layer) -> dict[str, torch.Tensor]:
    return dict(layer.experts.named_parameters()) | dict(layer.experts.named_buffers())


class Captured:
    """Graphs of a layer, one for each of ``TOKENS``."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.layer = layer
        self.inputs = {n: batch(SHAPE, n, "uniform", device, torch.bfloat16, n)[:3] for n in TOKENS}
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        with torch.inference_mode():
            for tokens, inputs in self.inputs.items():
                for _ in range(2):
                    layer.apply(*inputs)
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = layer.apply(*inputs)
                self.graphs[tokens] = graph, out

    def check(self, fresh: Layer) -> None:
        """Compare with a layer that was built from the same weights."""
        mine, want = held(self.layer), held(fresh)
        assert mine.keys() == want.keys()
        for name, tensor in want.items():
            flat = [t.contiguous().flatten().view(torch.uint8) for t in (mine[name], tensor)]
            assert torch.equal(*flat), name
        for tokens, (graph, out) in self.graphs.items():
            runs = [fresh.apply(*self.inputs[tokens]) for _ in range(4)]
            with torch.inference_mode():
                out.fill_(torch.nan)
            graph.replay()
            torch.cuda.synchronize()
            if all(torch.equal(run, runs[0]) for run in runs):
                assert torch.equal(out, runs[0]), tokens
            found = error(out, runs[0].float())
            assert found.whole <= RERUN[0] and found.token <= RERUN[1], (tokens, found)


def taken_from(memory: Any, make: Callable[[], Layer]) -> Layer:
    """A layer whose memory vLLM's sleep mode knows."""
    with memory.use_memory_pool(tag="weights"):
        return make()


@pytest.mark.parametrize("plain", [False, True], ids=["from nvfp4", "from bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_graphs_follow(gpu: torch.device, backend: str, plain: bool) -> None:
    from vllm.device_allocator.cumem import CuMemAllocator

    skip_elsewhere(backend)
    memory = CuMemAllocator.get_instance()
    one, two = (weights(seed, gpu, plain) for seed in (0, 1))
    layer = taken_from(memory, lambda: build(SHAPE, GATE, *one, backend))
    fresh = [build(SHAPE, GATE, *each, backend) for each in (one, two)]
    places = {name: tensor.data_ptr() for name, tensor in held(layer).items()}
    kernel = layer.experts.quant_method.moe_kernel
    graphs = Captured(layer, gpu)
    graphs.check(fresh[0])
    for which in (1, 0, 1, 1):
        reload(layer, (one, two)[which])
        graphs.check(fresh[which])

    memory.sleep(offload_tags=("weights",))  # level 1
    memory.wake_up()
    graphs.check(fresh[1])
    for which in (0, 1):
        buffers = {name: buffer.cpu() for name, buffer in layer.runner.named_buffers()}
        memory.sleep(offload_tags=())  # level 2
        memory.wake_up()
        poison(memory)
        for name, buffer in layer.runner.named_buffers():  # as vLLM's worker
            buffer.copy_(buffers[name])
        reload(layer, (one, two)[which])
        graphs.check(fresh[which])
    assert {name: tensor.data_ptr() for name, tensor in held(layer).items()} == places
    assert layer.experts.quant_method.moe_kernel is kernel


def poison(memory: Any) -> None:
    """What was discarded often comes back as zeros, or as it was: fill it with ones in each bit."""
    from vllm.device_allocator.cumem import libcudart

    torch.cuda.synchronize()
    for pointer, data in memory.pointer_to_data.items():
        if data.tag == "weights":
            libcudart.cudaMemset(pointer, 0xFF, data.handle[1])
    torch.cuda.synchronize()


def test_engine(tmp_path: Path) -> None:
    """One engine that quantizes a trained model on the fly, through all of it."""
    first, other = publish(nano() or own_model(), tmp_path / "first"), tmp_path / "other"
    changed(first, other)
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu.reload_engine", first, other],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"checks"')]
    found = json.loads(line)
    assert found["tokens differ between the checkpoints"]
    assert found["checks"] >= 7


def changed(source: Path, target: Path) -> None:
    """A copy whose every tensor is another, its correction biases so that other experts win."""
    import shutil

    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(source, target)
    random = torch.Generator().manual_seed(3)
    for file in target.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            metadata = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            noise = torch.randn(tensor.shape, generator=random)
            bias = name.endswith("e_score_correction_bias")
            new = noise if bias else tensor.float() * (1 + 0.1 * noise)
            tensors[name] = new.to(tensor.dtype)
        save_file(tensors, file, metadata)
