"""The CPU's kernels in C++ that this host can run, and random experts for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantize.experts.gates import Gate
from quantize.native import processor
from tests.conftest import ROOT
from tests.plugin.reference import dequantize
from vllm_nvfp4_moe.kernels.cpu import kernel as cpu
from vllm_nvfp4_moe.kernels.cpu.kernel import VARIANTS, Kernel, Variant


class EmulatedTiles(Variant):
    """AMX's loops with tiles in plain C++, for processors that have everything else."""

    def source(self) -> str:
        folder = Path(cpu.__file__).parent
        tiles = (folder / "tiles.h").read_text()
        assert tiles in super().source()
        return (
            super().source().replace(tiles, (ROOT / "tests/plugin/tiles_emulation.h").read_text())
        )


TILES = EmulatedTiles(
    replace(processor.AVX512_BF16, name="emulated AMX"), "amx.h", (torch.bfloat16,), invariant=False
)
HERE = [each for each in (*VARIANTS, TILES) if each.instructions.here]
NATIVE = [each for each in HERE if each is not TILES]
EXPERTS, TOP_K = 5, 2


@pytest.fixture(scope="module", params=HERE, ids=lambda each: each.instructions.name)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return Kernel(request.param)


class Case:
    """Random experts of a shape: scales of all sizes, and products of about 1."""

    def __init__(self, hidden: int, inner: int, gated: bool = True, biased: bool = False) -> None:
        self.hidden, self.inner = hidden, inner
        rows = inner * (1 + gated)
        self.w13, self.s13, self.g13 = self._weights(rows, hidden)
        self.w2, self.s2, self.g2 = self._weights(hidden, inner)
        self.b13 = torch.randn(EXPERTS, rows) if biased else None
        self.b2 = torch.randn(EXPERTS, hidden) if biased else None
        first = dequantize(self.w13, self.s13, self.g13[:, None, None])
        second = dequantize(self.w2, self.s2, self.g2[:, None, None])
        self.plain = [[*a.chunk(1 + gated), b] for a, b in zip(first, second, strict=True)]

    @staticmethod
    def _weights(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        codes = torch.randint(256, (EXPERTS, rows, columns // 2)).byte()
        scales = torch.randn(EXPERTS, rows, columns // 16).exp().to(torch.float8_e4m3fn)
        return codes, scales, torch.rand(EXPERTS) / columns**0.5 / 4

    def run(
        self, kernel: Kernel, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, gate: Gate,
        expert_map: torch.Tensor | None = None, on_input: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        return kernel.run(
            x, self.w13, self.s13, self.g13, self.w2, self.s2, self.g2, weights, ids, expert_map,
            gate, on_input, self.b13, self.b2,
        )  # fmt: skip
