"""What tests of the layer benchmark share: a tiny layer, a run of it on this machine's CPU, and
results as a run saves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest
import torch

from benchmarks import moe_layer
from benchmarks.moe_layer_table import SHAPES
from vllm_nvfp4_moe.doctor.shape import Shape

M3 = SHAPES["minimax-m3"]
TINY = Shape("tiny", 16, 256, 128, 4)
ABOUT = {"bandwidth": 4.3, "flops": 790.0, "routing": "uniform"}


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saved(times: Mapping[int, tuple[float, float, float]], shape: Shape = M3) -> dict[str, Any]:
    """A shape's results; ``times``: ours, Humming's and bf16's, by tokens."""
    return {
        "shape": asdict(shape),
        "kernels": {"ours": "Hopper", "humming": "HUMMING (X)", "bf16": "TRITON (Y)"},
        "errors": {},
        "rows": [
            {
                "tokens": tokens,
                "active": min(4.0 * tokens, 128.0),
                "ms": dict(zip(("ours", "humming", "bf16"), each, strict=True)),
                "iqr": {},
                "apart": {},
            }
            for tokens, each in times.items()
        ],
    }


GOOD = {
    1: (0.05, 0.075, 0.1),
    16: (0.58, 0.87, 2.0),
    256: (1.1, 1.65, 4.0),
    8192: (6.5, 9.75, 9.8),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(moe_layer.SHAPES, "qwen3-235b", TINY)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")


def run(*more: str) -> int:
    command = ["--device", "cpu", "--shapes", "qwen3-235b", "--kernels", "ours", "bf16"]
    return moe_layer.main([*command, "--rounds", "3", "--tp", "1", *more])
