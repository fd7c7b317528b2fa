"""vLLM's kernels that add biases of experts, and this package's own, against plain floats.

Biases are as large as what they are added to, or a hundredth of it: Marlin, for one, multiplies
w2's by the weights' global scale, so that without its preparation they would all but vanish.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.gpu.layer import Batch, Shape, batch, build, error, random_weights, skip_elsewhere
from tests.gpu.reference import GATES, Stored
from tests.gpu.test_layer import BOUNDS, release

SHAPES = [
    Shape("gpt-oss-quarter", 8, 2880, 720, 4),  # a rank's slice for tensor parallelism over four
    Shape("m3-nano", 32, 384, 128, 4),
    Shape("pad-narrow", 16, 448, 48, 2),
]
TOKENS = (1, 7, 64, 1024)
BACKENDS = ("humming", "marlin", "hopper", "hopper fp8")
GATE = "swiglu_oai"


def drawn(shape: Shape, device: torch.device, spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Biases of w13, whose products have a standard deviation of 6, and of w2, where it is 1."""
    generator = torch.Generator(device).manual_seed(5)

    def normal(rows: int, std: float) -> torch.Tensor:
        sizes = (shape.experts, rows)
        return (torch.randn(sizes, device=device, generator=generator) * std * spread).bfloat16()

    return normal(2 * shape.intermediate, 6.0), normal(shape.hidden, 1.0)


def routed(
    batch: Batch, w13: Stored, w2: Stored, biases: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """float32 ``[tokens, hidden]``, an expert at a time."""
    out = torch.zeros(batch.x.shape, device=batch.x.device)
    for expert in batch.ids.unique().tolist():
        token, slot = (batch.ids == expert).nonzero(as_tuple=True)
        both = batch.x[token].float() @ w13.weight(expert, torch.float32).T
        middle = GATES[GATE](*(both + biases[0][expert].float()).chunk(2, -1))
        result = middle @ w2.weight(expert, torch.float32).T + biases[1][expert].float()
        out.index_add_(0, token, result * batch.weights[token, slot].float().unsqueeze(1))
    return out


@pytest.mark.parametrize("spread", [1.0, 0.01])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_biases(
    shape: Shape, backend: str, spread: float, gpu: torch.device, measured: list[dict[str, Any]]
) -> None:
    skip_elsewhere(backend)
    w13, w2 = random_weights(shape, gpu)
    biases = drawn(shape, gpu, spread)
    layer = build(shape, GATE, w13, w2, backend, biases=biases)
    beyond = []
    for count in TOKENS:
        tokens = batch(shape, count, "uniform", gpu, torch.bfloat16, count)
        found = error(layer.apply(*tokens[:3]), routed(tokens, w13, w2, biases))
        measured.append(
            {"shape": shape.name, "backend": backend, "gate": f"{GATE}, biases {spread:g}",
             "batch": str(count), "whole": found.whole, "token": found.token}
        )  # fmt: skip
        whole, token = BOUNDS[backend, GATE]
        if not (found.whole <= whole and found.token <= token):
            beyond.append((count, found))
    release()
    assert not beyond


def test_two_of_w2s_biases_are_seen(gpu: torch.device) -> None:
    """The bounds above tell w2's biases added twice, as two ranks would, from once."""
    shape = SHAPES[1]
    w13, w2 = random_weights(shape, gpu)
    biases = drawn(shape, gpu, 1.0)
    tokens = batch(shape, 64, "uniform", gpu, torch.bfloat16, 64)
    twice = routed(tokens, w13, w2, (biases[0], 2 * biases[1]))
    whole, _ = BOUNDS["hopper fp8", GATE]
    assert error(twice, routed(tokens, w13, w2, biases)).whole > 2 * whole


@pytest.mark.parametrize("backend", ["auto", "marlin", "humming"])
def test_a_gpt_oss_engine(gpu: torch.device, tmp_path: Path, backend: str) -> None:
    """A whole engine, with its own attention, beside Transformers. Weights are random: what is
    compared is that nothing is left out. The engine computes in bfloat16, and may be off by a third
    of what the biases of one matrix in one layer make."""
    from safetensors.torch import load_file

    from quantize.checkpoint.reader import Checkpoint
    from quantize.execute import execute
    from quantize.run.plan import plan
    from tests.engine.score import prompts
    from tests.plugin import biased

    biased.save(
        tmp_path / "bf16",
        layers=2,
        hidden_size=128,
        head_dim=64,
        vocab_size=256,
        max_position_embeddings=128,
    )
    with Checkpoint(tmp_path / "bf16") as checkpoint:
        execute(checkpoint, plan(checkpoint), tmp_path / "nvfp4")
    settings = {
        "moe_backend": backend,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.1,
        "kv_cache_memory_bytes": 1 << 28,  # measured, it would be wrong beside other processes
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.score", str(tmp_path / "nvfp4"),
         str(tmp_path / "out.json"), json.dumps(settings)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ours = torch.tensor(json.loads((tmp_path / "out.json").read_text()))
    theirs = biased.log_probabilities(tmp_path / "nvfp4", "modelopt", prompts()).flatten()
    tensors = load_file(tmp_path / "nvfp4" / "model.safetensors")
    lost = []
    for layer, matrix in itertools.product(range(2), ("gate_proj", "up_proj", "down_proj")):
        zeros = {
            name: torch.zeros_like(tensor)
            for name, tensor in tensors.items()
            if f"layers.{layer}.mlp.experts" in name and name.endswith(f"{matrix}.bias")
        }
        assert zeros
        without = biased.damaged(tmp_path / "nvfp4", tmp_path / f"{layer} {matrix}", **zeros)
        other = biased.log_probabilities(without, "modelopt", prompts()).flatten()
        lost.append(float((other - theirs).abs().mean()))
    assert (ours - theirs).abs().mean() < min(lost) / 3
