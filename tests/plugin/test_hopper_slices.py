"""Experts whose width is no multiple of a stage's 128 columns, as slices of tensor parallelism have
them: the Hopper kernels' CUDA sources, run on a CPU (``emulation.py``), against plain floats.

``w13`` is padded to whole row tiles alone, so that its outputs may be fewer columns than ``w2``
reads; and its row tiles are dealt out in blocks of as many each. Faults in both are found.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.gpu import reference, reference_fp8
from tests.gpu.layer import Shape, error
from tests.gpu.packed import BOUND, GATES, Packed
from tests.plugin.emulation import CPU, Emulated, body, build
from tests.plugin.mutants import OUTSIDE, Mutant, with_switches
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

SLICE = Shape("slice", 4, 256, 176, 2)
"""352 rows of gate and up: six row tiles, two blocks of three; 192 columns, 256 with padding."""
BOUNDS = {"bf16": BOUND, "fp8": 4e-3}

BOTH = {
    "blocks-of-four": Mutant(
        "pair(item) % row_blocks * block_groups", "pair(item) % row_blocks * Shape::ROW_GROUPS"
    ),
    # 150 tokens fill the ring a few times.
    "all-are-waited-for": Mutant(
        "4 * Schedule<Shape>::groups_of_block(args)",
        "4 * Shape::ROW_GROUPS",
        tokens=150,
        said="deadlock",
    ),
    "all-work": Mutant(
        "warpgroup() < args.block_groups", "true", tokens=150, said="deadlock|one arrival"
    ),
    "a-block-too-long": Mutant(
        "min(SPLITS ? block_groups : Shape::ROW_GROUPS, row_tiles - begin)",
        "block_groups + 1",
        said=f"one arrival too many|wrong output|{OUTSIDE}",
    ),
}
MUTANTS = {
    "bf16": BOTH | {
        # In `gather` and, of few pairs, `route_and_gather`.
        "many-not-cleared": Mutant("clear_padding(middle, place);", "", of=2, tokens=40),
        "few-not-cleared": Mutant("clear_padding(middle, place);", "", of=2, number=1),
        "first-not-cleared": Mutant("middle.columns / 8 + threadIdx.x",
                                    "middle.columns / 8 + 1 + threadIdx.x"),
        "last-not-cleared": Mutant("unit < middle.padded / 8", "unit < middle.padded / 8 - 1"),
    },
    "fp8": BOTH | {
        "padding-not-rounded": Mutant("unit < padded / 16", "unit < columns / 16",
                                      of=2, number=1),
        "rows-as-wide": Mutant("int64_t(at) * columns / 8", "int64_t(at) * padded / 8",
                               said=f"wrong output|{OUTSIDE}"),
        "tiles-as-narrow": Mutant("row_in_tile(out, padded, place)",
                                  "row_in_tile(out, columns, place)", of=2, number=1),
        "scale-of-more": Mutant("scale_of(row, columns)", "scale_of(row, padded)",
                                said=f"wrong output|{OUTSIDE}"),
    },
}  # fmt: skip


class Bench:
    """A kernel with all of its mutants, and a slice's weights."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.kernel, self.mutants = name, KERNELS[name], MUTANTS[name]
        rule = reference.routed if name == "bf16" else reference_fp8.routed
        self.packed = Packed.random(SLICE, CPU, self.kernel, rule)
        source = with_switches(body(self.kernel), self.mutants.values())
        self.library = build(folder, source, self.kernel)

    def said(self, mutant: str, tokens: int, patch: pytest.MonkeyPatch) -> set[str]:
        """What was wrong with each tile shape of several row groups and each seed; or nothing."""
        number = list(self.mutants).index(mutant) if mutant else None
        self.library.emulation_mutants(0 if number is None else 1 << number)
        emulated = Emulated(self.library, self.kernel, patch)
        x, ids, weights = self.packed.batch(tokens)
        truth = self.packed.truth(x, ids, weights)
        found = set()
        for shape in self.kernel.tile_shapes:
            for seed in (1, 2, 3):
                try:
                    out = emulated.run(
                        x, self.packed.experts, ids, weights, GATES["silu"], tile_shape=shape,
                        processors=2, seed=seed,
                    )  # fmt: skip
                except AssertionError as wrong:
                    found.add(str(wrong))
                else:
                    right = error(out, truth).whole < BOUNDS[self.name]
                    found.add("" if right else f"wrong output of {shape}")
        return found


@pytest.fixture(scope="module", params=MUTANTS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(request.param, tmp_path_factory.mktemp("slices"))


@pytest.mark.parametrize("tokens", [4, 5, 40])
def test_right(bench: Bench, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.said("", tokens, monkeypatch) == {""}


def test_no_more_rows_than_whole_row_tiles(bench: Bench) -> None:
    """So that a slice reads and multiplies little that is not there."""
    assert bench.packed.experts.w13.shape[1] == 352 // 64 + 1
    assert bench.packed.experts.w2.shape[1] == 256 // 64
    assert bench.packed.experts.w2.shape[2] * bench.kernel.packed_columns == 256


def test_faults_are_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    missed = {}
    for name, mutant in bench.mutants.items():
        said = bench.said(name, mutant.tokens, monkeypatch)
        if not any(re.search(mutant.said, text) for text in said):
            missed[name] = said
    assert not missed
