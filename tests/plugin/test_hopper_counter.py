"""Tiles that CTAs take by a counter (``TILES_BY_COUNTER`` in gemm.cuh), on a CPU: right, and equal
to the last bit whoever takes which; and faults put in on purpose, as in test_hopper_mutants.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.gpu import reference_fp8
from tests.gpu.layer import Shape, error
from tests.gpu.packed import BOUND, GATES, Packed
from tests.plugin.emulation import CPU, Emulated, body, build
from tests.plugin.mutants import OUTSIDE, Mutant, with_switches
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

SEEDS = range(1, 10)
# Both products have stages enough for a counter (MIN_STEPS_BY_COUNTER), the second just so. In
# 64x256 tiles begin with the same stages of the ring, in bf16 the first product's, in FP8 the
# second's.
DEEP = Shape("deep", 4, 768, 512, 2)

FREE = "barrier_wait(empty + 8 * ring.stage, ring.phase ^ 1);"
WAIT = "barrier_wait(full + 8 * ring.stage, ring.phase);"
STUCK = "deadlock"
ANY = f"wrong output|{OUTSIDE}|{STUCK}|copy over|no mbarrier|differ"

MUTANTS = {
    "cleared": Mutant("size_ends[max_tokens / token_step + thread] = 0;", "", said=ANY),
    "its-own": Mutant("(FIRST ? 0 : 1)", "0"),
    "next": Mutant("dealt + atomicAdd(counter, 1)", "dealt + 1 + atomicAdd(counter, 1)"),
    "dealt": Mutant("after = index + gridDim.x;", "after = index + 2 * gridDim.x;"),
    # A tile is announced over one that not all have read yet.
    "stage-free": Mutant(FREE, "", of=3, said=ANY),
    "end-free": Mutant(FREE, "", of=3, number=2, said=ANY),
    "announced": Mutant("announced[ring.stage] = Announced{tile, index, {}};", "", said=ANY),
    "end-announced": Mutant("announced[ring.stage].index = total;", "", said=ANY),
    "end-arrives": Mutant("barrier_arrive(full + 8 * ring.stage);", "", said=STUCK),
    "index-waited-for": Mutant(WAIT, "", said=ANY),
}  # fmt: skip


class Bench:
    """A kernel with all of the mutants."""

    def __init__(self, name: str, folder: Path) -> None:
        self.kernel = KERNELS[name]
        self.bound = {"bf16": BOUND, "fp8": 4e-3}[name]
        rule = {} if name == "bf16" else {"kernel": self.kernel, "rule": reference_fp8.routed}
        self.packed = Packed.random(DEEP, CPU, **rule)
        self.shapes = [shape for shape in self.kernel.tile_shapes if shape.max_tokens == 64]
        source, count = re.subn(r"(TILES_BY_COUNTER =) \w+", r"\1 true", body(self.kernel))
        assert count == 1
        # bf16's consumers wait in the same words.
        mutants = [
            replace(m, of=source.count(m.part)) if m.part == WAIT else m for m in MUTANTS.values()
        ]
        self.library = build(folder, with_switches(source, mutants), self.kernel)

    def emulated(self, patch: pytest.MonkeyPatch, mutant: str = "") -> Emulated:
        self.library.emulation_mutants(1 << list(MUTANTS).index(mutant) if mutant else 0)
        return Emulated(self.library, self.kernel, patch)


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize(("tokens", "routing"), [(9, "skewed"), (90, "uniform")])
def test_whoever_takes_which(
    bench: Bench, tokens: int, routing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one CTA, which takes all, to more than there are tiles."""
    emulated, packed = bench.emulated(monkeypatch), bench.packed
    x, ids, weights = packed.batch(tokens, routing)
    rest = packed.experts, ids, weights, GATES["silu"]
    for shape in bench.shapes:
        one = emulated.run(x, *rest, tile_shape=shape, processors=1)
        assert error(one, packed.truth(x, ids, weights)).whole < bench.bound
        for processors in (2, 40):
            assert torch.equal(
                emulated.twice(x, *rest, tile_shape=shape, processors=processors), one
            )


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_found(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emulated, packed = bench.emulated(monkeypatch, name), bench.packed
    x, ids, weights = packed.batch(4)
    truth = packed.truth(x, ids, weights)
    said = []
    for seed in SEEDS:
        try:
            out = emulated.run(
                x, packed.experts, ids, weights, GATES["silu"],
                tile_shape=bench.shapes[-1], processors=2, seed=seed,
            )  # fmt: skip
        except AssertionError as wrong:
            said.append(str(wrong))
        else:
            right = error(out, truth).whole < 2 * bench.bound
            said.append("" if right else "wrong output")
        if re.search(MUTANTS[name].said, said[-1]):
            return
    raise AssertionError(said)
