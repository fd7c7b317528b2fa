"""Faults put into the Hopper kernels' sources on purpose: the emulation finds each, so that what
passes elsewhere means something.

All of a kernel's faults are in one library, each behind a switch. One is found if any of ``SEEDS``
ends with an error of the emulation or with a wrong output.

Three things are no faults by PTX's rules, though the sources have them right: the wait in FP8's
epilogue (its consumers have seen X, which was copied after the producer's wait); that FP8's
``requantize`` waits before it triggers (the GEMM before it has waited, so ``route`` has ended); and
that bf16's ``gather`` does (the first GEMM, which follows, waits).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from tests.gpu import reference_fp8
from tests.gpu.layer import Shape, error
from tests.gpu.packed import BOUND, GATES, Packed
from tests.plugin.emulation import CPU, Emulated, body, build
from tests.plugin.mutants import OUTSIDE, Mutant, with_switches
from vllm_nvfp4_moe.kernels.hopper import bf16, fp8
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

SEEDS = range(1, 7)
TINY = Shape("tiny", 4, 256, 128, 2)


WAIT, TRIGGER, SYNC = "wait_for_previous_kernel();", "trigger_next_kernel();", "__syncthreads();"

# Few pairs (4 tokens of 2 experts) are routed by each CTA, in bf16; 80 by `route`.
BOTH = {
    # Barriers of a CTA: mbarriers made, experts' counts cleared, all counted, tiles' rows known.
    "barriers-made": Mutant(SYNC, "", of=9, said="no mbarrier"),
    "counts-cleared": Mutant(SYNC, "", of=9, number=1, tokens=40),
    "counted": Mutant(SYNC, "", of=9, number=2, tokens=40, said="divides by zero"),
    "rows-known": Mutant(SYNC, "", of=9, number=3, tokens=40, said="wrong output|from outside"),
    "weights-there": Mutant(SYNC, "", of=9, number=8),  # a token's, for the sum
    "producers": Mutant(
        "barrier_init(full + 8 * i, PRODUCERS);",
        "barrier_init(full + 8 * i, PRODUCERS - 1);",
        said="one arrival too many|wrong output",
    ),
    # One element too far.
    "tiles-read": Mutant(
        "schedule.tile(index + gridDim.x)", "1 << 10", said=f"wrong output|{OUTSIDE}"
    ),
    # Each part of a tile that is split takes the first rows; or no part has the last.
    "split-rows": Mutant("(1 << shift) - 1", "0", tokens=5, said=".+"),
    "split-items": Mutant("whole + (pairs - whole << shift)", "pairs", tokens=5, said=".+"),
    "tiles-written": Mutant(
        "tiles[first + i]", "tiles[first + i + 8]", of=2, tokens=40, said=OUTSIDE
    ),
    "sizes": Mutant(
        "size_ends[thread] = end;", "size_ends[thread + 1] = end;", of=2, tokens=40, said=OUTSIDE
    ),
    "places": Mutant("places[pair] = place;", "places[pair + 1] = place;", tokens=40, said=OUTSIDE),
    "ids": Mutant("ids[pair] >= 0", "ids[pair + 1] >= 0", map=True, said=OUTSIDE),
    "local": Mutant("local[ids[pair]]", "local[ids[pair] + 1]", map=True, said=OUTSIDE),
    # What is wrong enough to end a process ends none but its own.
    "process": Mutant("sizes[thread] = size | each << 16;", "abort();", tokens=40,
                      said="its process died of signal 6"),
    "router-weights": Mutant(
        "router_weights[pair]", "router_weights[pair + 1]", of=2, number=1, said=OUTSIDE
    ),
}  # fmt: skip

COMMIT = "mma_commit();\n" + 16 * " " + "mma_wait<1>();\n" + 16 * " "
RELEASE = "if (half == 0 && first == 0 && before >= 0 && lane == 0)\n" + 20 * " "
RELEASE += "barrier_arrive(empty + 8 * before);"
RELEASE_FP8 = "if (k == 2 && before && lane == 0) barrier_arrive(before);"
MEET = "named_barrier_sync<K_GROUPS * 128>();"

MUTANTS = {
    "bf16": BOTH | {
        # Waits: of the first GEMM, the second's producer of X, `combine` and `gather`.
        "first-waits": Mutant(WAIT, "", of=4),
        "first-triggers-first": Mutant(WAIT, TRIGGER + WAIT, of=4),
        "second-waits": Mutant(WAIT, "", of=4, number=1),
        "combine-waits": Mutant(WAIT, "", of=4, number=2),
        "gather-waits": Mutant(WAIT, "", of=4, number=3, tokens=40),
        # Few pairs: experts known, plans known, places known; and an element too far.
        "experts-known": Mutant(SYNC, "", of=9, number=4),
        "plans-known": Mutant(SYNC, "", of=9, number=5),
        "places-known": Mutant(SYNC, "", of=9, number=6),
        "few-tiles": Mutant(
            "tiles[first + i]", "tiles[first + i + 8]", of=2, number=1, said=OUTSIDE
        ),
        "few-sizes": Mutant(
            "size_ends[thread] = end;", "size_ends[thread + 1] = end;", of=2, number=1, said=OUTSIDE
        ),
        "few-places": Mutant(
            "places[blockIdx.x] = place;", "places[blockIdx.x + 1] = place;", said=OUTSIDE
        ),
        "partial-read": Mutant(MEET, "", of=2),
        "partial-written": Mutant(MEET, "", of=2, number=1),
        "arrivals": Mutant(
            "barrier_init(empty + 8 * i, 4 * Schedule<Shape>::groups_of_block(args));",
            "barrier_init(empty + 8 * i, 4 * Schedule<Shape>::groups_of_block(args) + 1);",
            tokens=150,
            said="deadlock: .* waits for mbarrier",
        ),
        "registers": Mutant(
            COMMIT + RELEASE, f"mma_commit(); mma_wait<2>(); {RELEASE}", tokens=150,
            said="A overwritten under an MMA",
        ),
        "stage-given-back": Mutant(
            COMMIT + RELEASE, f"mma_commit(); {RELEASE} mma_wait<1>();", tokens=150
        ),
    },
    "fp8": {name: Mutant(**{**vars(m), "of": 10 if m.part == SYNC else m.of})
            for name, m in BOTH.items()} | {
        "row-maximum": Mutant(SYNC, "", of=10, number=9),
        "producer-waits": Mutant(WAIT, "", of=6, number=1),
        "combine-waits": Mutant(WAIT, "", of=6, number=2),
        # The first GEMM reads tables that are not there yet.
        "gather-waits": Mutant(WAIT, "", of=6, number=4, said=f"wrong output|{OUTSIDE}"),
        "gather-triggers-first": Mutant(
            WAIT, TRIGGER + WAIT, of=6, number=4, said=f"wrong output|{OUTSIDE}"
        ),
        "requantize-waits": Mutant(WAIT, "", of=6, number=5),
        "registers": Mutant(
            "mma_wait<3>();", "mma_wait<4>();", tokens=150, said="A overwritten under an MMA"
        ),
        "stage-given-back": Mutant(
            RELEASE_FP8, RELEASE_FP8.replace("k == 2", "k == 0"), tokens=150
        ),
        # Of two chunks' scales, or of two halves of an MMA's columns, the other.
        "scales": Mutant("magnitude_table(ones, threes, 2 * half)",
                         "magnitude_table(ones, threes, 2 - 2 * half)"),
        "columns": Mutant("(unit % 8 ^ place.index % 8)", "(unit % 8 ^ 1 ^ place.index % 8)"),
    },
}  # fmt: skip
CASES = [(kernel, name) for kernel, mutants in MUTANTS.items() for name in mutants]


class Bench:
    """A kernel with all of its mutants, and weights to run it on."""

    def __init__(self, name: str, folder: Path) -> None:
        self.kernel, self.mutants = KERNELS[name], MUTANTS[name]
        self.shape = {"bf16": bf16.TOKENS_8, "fp8": fp8.TOKENS_64}[name]
        self.large = {"bf16": bf16.TOKENS_64, "fp8": fp8.TOKENS_64}[name]
        self.bound = {"bf16": BOUND, "fp8": 4e-3}[name]
        rule = {} if name == "bf16" else {"kernel": self.kernel, "rule": reference_fp8.routed}
        self.packed = Packed.random(TINY, CPU, **rule)
        source = with_switches(body(self.kernel), self.mutants.values())
        self.library: ctypes.CDLL = build(folder, source, self.kernel)

    def said(self, names: Iterable[str], mutant: Mutant, patch: pytest.MonkeyPatch) -> list[str]:
        """What was wrong with each seed, with the mutants of these names on; or nothing."""
        numbers = [list(self.mutants).index(name) for name in names]
        self.library.emulation_mutants(sum(1 << number for number in numbers))
        emulated = Emulated(self.library, self.kernel, patch)
        # 150 tokens fill a CTA's turns, 5 leave one tile for three CTAs.
        processors = {150: 1, 5: 3}.get(mutant.tokens)
        shape = self.large if processors else self.shape
        x, ids, weights = self.packed.batch(mutant.tokens)
        ids[-1, -1] = TINY.experts - 1  # the last of the map
        local = torch.arange(TINY.experts, dtype=torch.int32) if mutant.map else None
        truth = self.packed.truth(x, ids, weights)
        found = []
        for seed in SEEDS:
            try:
                out = emulated.run(
                    x, self.packed.experts, ids, weights, GATES["silu"], local=local,
                    tile_shape=shape, processors=processors or 2, seed=seed,
                )  # fmt: skip
            except AssertionError as wrong:
                found.append(str(wrong))
            else:
                right = error(out, truth).whole < 2 * self.bound
                found.append("" if right else "wrong output")
        return found


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bench]:
    return {name: Bench(name, tmp_path_factory.mktemp(name)) for name in MUTANTS}


@pytest.mark.parametrize(("kernel", "name"), CASES)
def test_it_is_found(
    kernel: str, name: str, benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = MUTANTS[kernel][name]
    said = benches[kernel].said([name], mutant, monkeypatch)
    assert any(re.search(mutant.said, text) for text in said), said


@pytest.mark.parametrize("kernel", MUTANTS)
def test_no_wait_at_all_is_found_each_time_that_kernels_overlap(
    kernel: str, benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = [name for name in MUTANTS[kernel] if name.endswith("-waits")]
    said = benches[kernel].said(waits, Mutant("", ""), monkeypatch)
    assert [bool(text) for text in said] == [True, True, False] * 2


@pytest.mark.parametrize("kernel", MUTANTS)
@pytest.mark.parametrize("mutant", [Mutant("", "", tokens=n, map=n == 40) for n in (4, 5, 40, 150)])
def test_without_a_fault_nothing_is_found(
    kernel: str, mutant: Mutant, benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert set(benches[kernel].said([], mutant, monkeypatch)) == {""}


@pytest.mark.parametrize(
    ("tokens", "where"), [(4, r"route_and_gather, CTA \d+"), (40, "route, CTA 0")]
)
def test_what_a_caller_gives_is_bounded_too(
    tokens: int, where: str, benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids past the end of the map, which vLLM does not give."""
    bench = benches["bf16"]
    bench.library.emulation_mutants(0)
    emulated = Emulated(bench.library, bench.kernel, monkeypatch)
    x, ids, weights = bench.packed.batch(tokens)
    ids[2, 1] = TINY.experts + 16  # in the guard page beside it: none but `local` is near
    local = torch.arange(TINY.experts, dtype=torch.int32)
    said = []
    for seed in SEEDS:  # which also chooses at which end of its pages a tensor lies
        try:
            emulated.run(
                x, bench.packed.experts, ids, weights, GATES["silu"], local=local, seed=seed
            )
        except AssertionError as wrong:
            said.append(str(wrong))
    assert any(re.search(f"^{where}, thread 5: .* past the end of local", one) for one in said), (
        said
    )
