"""The Hopper kernels for experts without a gate (ReLU squared) and with biases: their CUDA sources,
run on a CPU (``emulation.py``), against plain floats.

What they share with other experts is in ``emulated_cases``, their waits and barriers are in
``test_hopper_mutants``. A form's library has faults in it (``mutants.py``), which are off but where
each is looked for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantize.experts.gates import Gate
from quantize.native.jit import KernelError
from tests.gpu import reference, reference_fp8
from tests.gpu.layer import Shape, error
from tests.gpu.packed import BOUND, GATES, RELU2, Packed, pack
from tests.gpu.reference import Stored
from tests.plugin.emulated_cases import COUNTS
from tests.plugin.emulation import CPU, Emulated, body, build
from tests.plugin.mutants import OUTSIDE, Mutant, with_switches
from vllm_nvfp4_moe.kernels.hopper.bf16_weights import Rows, packed_biases
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS
from vllm_nvfp4_moe.kernels.hopper.source import Form

FORMS = {
    "relu2": Form(gated=False),
    "biased": Form(biased=True),
    "relu2 biased": Form(gated=False, biased=True),
}
BOUNDS = {"bf16": BOUND, "fp8": 4e-3}
"""As of ``test_hopper_emulated`` and ``test_hopper_fp8``."""

ADDED = "(int64_t(tile.expert) * args.row_tiles + row_tile) * GROUP_ROWS + row"
BIASES = {
    "other-row": Mutant("return {from[0], from[8]};", "return {from[8], from[0]};"),
    "other-warp": Mutant(
        "threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4", "threadIdx.x % 32 / 4"
    ),
    "other-row-tile": Mutant(ADDED, ADDED.replace(" + row_tile", "")),
    "other-expert": Mutant(ADDED, ADDED.replace("int64_t(tile.expert)", "int64_t(0)")),
    "scaled": Mutant("sum * scale + bias", "(sum + bias) * scale"),
    "left-out": Mutant("sum * scale + bias", "sum * scale"),
    "other-matrix": Mutant(
        "args.set_bias(spec.bias13);",
        "args.set_bias(spec.bias2);",
        said=f"wrong output|{OUTSIDE}",
    ),
    # On ranks that have none.
    "null": Mutant("if (!bias) return {0.0f, 0.0f};", "", said=OUTSIDE),
}
UNGATED = {
    "not-squared": Mutant("return up * up;", "return up;"),
    "below-zero": Mutant("up = up < 0.0f ? 0.0f : up;", ""),
    "nan": Mutant("up = up < 0.0f ? 0.0f : up;", "up = fmaxf(up, 0.0f);", said="NaN is lost"),
}
ROUTER = {"weight-of-zero": Mutant("weight != 0.0f", "true", said="output is not finite")}

GATE_BF16 = "activate(sum(4 * j), sum(4 * j + 2), args.gate)"
GATE_FP8 = "activated(d[4 * j], d[4 * j + 2])"
MUTANTS: dict[tuple[str, str], dict[str, Mutant]] = {
    ("bf16", "biased"): BIASES | {
        "after-the-gate": Mutant(
            GATE_BF16, "activate(d[4 * j] * scale, d[4 * j + 2] * scale, args.gate) + bias.x"
        ),
    },
    ("fp8", "biased"): BIASES | {
        "after-the-gate": Mutant(
            GATE_FP8, "activated(d[4 * j] - bias.x, d[4 * j + 2] - bias.y) + bias.x"
        ),
    },
    ("bf16", "relu2"): UNGATED | ROUTER | {
        # Where a token's columns lie in the next GEMM's tiles.
        "swizzle": Mutant("warp * 2 + quad / 2 ^ group", "warp * 2 + quad / 2"),
        "half-unit": Mutant("quad % 2 * 8", "0"),
        "order": Mutant("relu2(sum(4 * j + i))", "relu2(sum(4 * j + (i ^ 2)))"),
        "row-tile": Mutant("int64_t(row_tile) * (N * 128)", "0"),
        "four-columns": Mutant("relu2(sum(4 * j + i + 1))", "relu2(sum(4 * j + i))"),
    },
    ("fp8", "relu2"): UNGATED | ROUTER | {
        "without": Mutant("FIRST ? relu2(d[i]) : d[i]", "d[i]"),
        "twice": Mutant("FIRST ? relu2(d[i]) : d[i]", "relu2(d[i])"),
    },
    ("bf16", "relu2 biased"): {
        "after-relu2": Mutant(
            "relu2(sum(4 * j + i))", "relu2(d[4 * j + i] * scale) + (i ? bias.y : bias.x)"
        ),
    },
    ("fp8", "relu2 biased"): {
        "after-relu2": Mutant(
            "FIRST ? relu2(d[i]) : d[i]",
            "FIRST ? relu2(d[i] - (i & 2 ? bias.y : bias.x)) + (i & 2 ? bias.y : bias.x) : d[i]",
        ),
    },
}  # fmt: skip


class Bench:
    """A kernel for one form of experts, with faults that may be turned on."""

    def __init__(self, name: str, form: str, folder: Path) -> None:
        self.name, self.form, self.kernel = name, FORMS[form], KERNELS[name]
        self.gates = ["relu2"] if not self.form.gated else ["silu", "swiglu_oai"]
        self.mutants = MUTANTS[name, form]
        self.bound = BOUNDS[name]
        self.library = build(
            folder,
            with_switches(body(self.kernel, self.form), self.mutants.values()),
            self.kernel,
        )

    def emulated(self, patch: pytest.MonkeyPatch, mutant: str = "") -> Emulated:
        number = list(self.mutants).index(mutant) if mutant else -1
        self.library.emulation_mutants(1 << number if mutant else 0)
        return Emulated(self.library, self.kernel, patch, self.form)

    def packed(self, name: str, *sizes: int) -> Packed:
        """Experts of a shape."""
        shape = Shape(name, *sizes, GATES["silu"] if self.form.gated else RELU2)
        rule = reference.routed if self.name == "bf16" else reference_fp8.routed
        return Packed.random(shape, CPU, self.kernel, rule, self.form.biased)


@pytest.fixture(scope="module", params=list(MUTANTS), ids=lambda key: "-".join(key))
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(*request.param, tmp_path_factory.mktemp("form"))


def gate_of(name: str) -> Gate:
    return RELU2 if name == "relu2" else GATES[name]


@pytest.mark.parametrize(
    ("sizes", "tokens", "routing", "processors", "gate"),
    [((8, 400, 48, 2), 5, "uniform", 7, 0), ((8, 256, 320, 2), 40, "skewed", 3, -1)],
    ids=["pad-both", "odd"],
)
def test_as_the_reference(
    bench: Bench,
    sizes: tuple[int, ...],
    tokens: int,
    routing: str,
    processors: int,
    gate: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither size a multiple of a tile; row tiles no multiple of two or four."""
    packed, emulated = bench.packed("any", *sizes), bench.emulated(monkeypatch)
    x, ids, weights = packed.batch(tokens, routing)
    name = bench.gates[gate]
    truth = packed.truth(x, ids, weights, name)
    for tile_shape in bench.kernel.tile_shapes:
        out = emulated.twice(
            x, packed.experts, ids, weights, gate_of(name),
            tile_shape=tile_shape, processors=processors,
        )  # fmt: skip
        assert error(out, truth).whole < bench.bound, tile_shape


def test_every_size_of_tile_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """With padding between the products, which is to be zero for each of them."""
    emulated = bench.emulated(monkeypatch)
    for tile_shape in bench.kernel.tile_shapes:
        counts = COUNTS[tile_shape.max_tokens]
        packed = bench.packed("one choice", len(counts), 128, 64, 1)
        ids = torch.arange(len(counts), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
        ids = ids[order].unsqueeze(1)
        x, _, weights = packed.batch(len(ids))
        gate = bench.gates[0]
        out = emulated.run(
            x, packed.experts, ids, weights, gate_of(gate), tile_shape=tile_shape, processors=4
        )
        found = error(out, packed.truth(x, ids, weights, gate))
        assert found.token < 3 * bench.bound, tile_shape


@pytest.mark.parametrize("ranks", [2, 4])
def test_slices_of_tensor_parallelism(
    bench: Bench, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks' outputs add up to the whole. ``w2``'s biases are the first rank's; others have none or
    zeros for them, which is the same. Slices of 48 and 96 are padded."""
    whole, emulated = bench.packed("whole", 4, 256, 192, 2), bench.emulated(monkeypatch)
    x, ids, weights = whole.batch(9)
    gate = bench.gates[-1]
    total = torch.zeros(x.shape)
    for rank in range(ranks):

        def of_rows(tensor: torch.Tensor, rank: int = rank) -> torch.Tensor:
            return tensor.unflatten(1, (2, ranks, -1))[:, :, rank].flatten(1, 2).contiguous()

        w13 = Stored(of_rows(whole.w13[0]), of_rows(whole.w13[1]), whole.w13[2])
        w2 = Stored(*(part.chunk(ranks, 2)[rank] for part in whole.w2[:2]), whole.w2[2])
        bias13, bias2 = whole.biases
        if bias13 is not None and bias2 is not None:
            bias13, bias2 = of_rows(bias13), bias2 if rank == 0 else torch.zeros_like(bias2)
        experts = pack(bench.kernel, bench.form.gated, w13, w2, (bias13, bias2))
        out = emulated.run(x, experts, ids, weights, gate_of(gate))
        total += out
        if bias13 is not None and rank:
            without = dataclasses.replace(experts, bias2=None)
            assert torch.equal(emulated.run(x, without, ids, weights, gate_of(gate)), out)
    # FP8: a slice's values between the products have a scale of their own.
    bound = bench.bound if bench.name == "bf16" else 0.05
    assert error(total, whole.truth(x, ids, weights, gate)).whole < bound


def test_experts_elsewhere_and_choices_of_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks' outputs add up to one's; nobody's choice adds nothing, no bias either."""
    packed, emulated = bench.packed("small", 8, 400, 48, 2), bench.emulated(monkeypatch)
    x, ids, weights = packed.batch(20)
    ids[::3, 1] = -1
    ids[4] = -1
    gate = bench.gates[0]
    total = torch.zeros(x.shape)
    for rank in range(2):
        mine = torch.arange(rank, 8, 2)
        local = torch.full((8,), -1, dtype=torch.int32)
        local[mine] = torch.arange(4, dtype=torch.int32)
        w13, w2 = (Stored(*(t[mine] for t in stored)) for stored in (packed.w13, packed.w2))
        bias13, bias2 = (None if bias is None else bias[mine] for bias in packed.biases)
        experts = pack(bench.kernel, bench.form.gated, w13, w2, (bias13, bias2))
        rest = ids, weights, gate_of(gate)
        out = emulated.twice(x, experts, *rest, local=local)
        assert not out[4].count_nonzero()
        total += out
        nowhere = torch.full_like(local, -1)
        assert not emulated.run(x, experts, *rest, local=nowhere).count_nonzero()
    truth = packed.truth(x, ids.clamp(min=0), weights.masked_fill(ids < 0, 0), gate)
    assert error(total, truth + 1e-30).whole < bench.bound


def test_packed_biases_are_beside_their_rows() -> None:
    """Biases that are their rows' numbers, through the order of the MMA's rows; padding is zero."""
    numbers = torch.arange(1.0, 2 * 80 + 1).view(1, 160)
    gate_and_up = packed_biases(numbers, Rows.GATE_AND_UP)[0].unflatten(0, (-1, 2, 8))
    gate, up = gate_and_up[:, 0].flatten(), gate_and_up[:, 1].flatten()
    assert gate[:80].tolist() == [*range(1, 81)] and up[:80].tolist() == [*range(81, 161)]
    assert len(gate) == 96 and not gate[80:].count_nonzero() and not up[80:].count_nonzero()
    # Of each 16 rows the MMA's are in an order of their own.
    order = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    found = packed_biases(numbers.bfloat16(), Rows.OF_ONE)
    assert found.dtype == torch.float32 and found.shape == (1, 192)
    expected = numbers[0].unflatten(0, (-1, 16))[:, order].flatten()
    assert torch.equal(found[0, :160], expected)
    assert not found[0, 160:].count_nonzero()
    assert packed_biases(numbers[:0], Rows.OF_ONE).shape == (0, 192)


def test_what_does_not_belong_together_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel gets pointers: another gate's weights or biases would be garbage."""
    packed, emulated = bench.packed("small", 4, 128, 128, 2), bench.emulated(monkeypatch)
    x, ids, weights = packed.batch(4)
    other = GATES["silu"] if "relu2" in bench.gates else RELU2
    with pytest.raises(KernelError, match=rf"w13 is .* row tiles, .* {other} takes"):
        emulated.run(x, packed.experts, ids, weights, other)
    form = "swiglu_step" if bench.form.gated else "relu"
    with pytest.raises(KernelError, match=f"kernels do not have {form}"):
        emulated.run(x, packed.experts, ids, weights, Gate(form))
    rows = packed.experts.w13.shape[1] * 64
    right = torch.zeros(4, rows)
    for name in ("bias13", "bias2"):
        for wrong in (right[:3], right.bfloat16(), right[:, 1:], right.repeat(1, 2)[:, ::2][:, :1]):
            experts = dataclasses.replace(packed.experts, **{name: wrong})
            with pytest.raises(KernelError, match=f"{name} must be contiguous float32 "):
                emulated.run(x, experts, ids, weights, gate_of(bench.gates[0]))


# What a fault is looked for with. Each says what is wrong, or nothing.


def ordinary(bench: Bench, emulated: Emulated, tokens: int) -> str:
    packed = bench.packed("tiny", 4, 256, 192, 2)
    x, ids, weights = packed.batch(tokens)
    gate = bench.gates[-1]
    out = emulated.run(x, packed.experts, ids, weights, gate_of(gate))
    right = error(out, packed.truth(x, ids, weights, gate)).whole < 2 * bench.bound
    return "" if right else "wrong output"


def without_w2s_biases(bench: Bench, emulated: Emulated) -> str:
    packed = bench.packed("tiny", 4, 128, 128, 2)
    x, ids, weights = packed.batch(4)
    experts = dataclasses.replace(packed.experts, bias2=None)
    out = emulated.run(x, experts, ids, weights, gate_of(bench.gates[0]))
    packed = packed._replace(biases=(packed.biases[0], None))
    right = error(out, packed.truth(x, ids, weights, bench.gates[0])).whole < 2 * bench.bound
    return "" if right else "wrong output"


def with_nan(bench: Bench, emulated: Emulated) -> str:
    """It comes out of the token it went into, and of no other."""
    packed = bench.packed("tiny", 4, 128, 128, 2)
    x, ids, weights = packed.batch(9)
    x[5, 3] = torch.nan
    out = emulated.run(x, packed.experts, ids, weights, gate_of(bench.gates[0]))
    others = [i for i in range(9) if i != 5]
    if not out[others].isfinite().all():
        return "output is not finite"
    return "" if out[5].isnan().all() else "NaN is lost"


def with_weights_of_zero(bench: Bench, emulated: Emulated) -> str:
    """vLLM's router of LongCat gives expert 0 a weight of zero where an expert that computes
    nothing was chosen. Expert 0 was not: that it is infinite must not show."""
    packed = bench.packed("tiny", 4, 128, 128, 2)
    x, ids, weights = packed.batch(12)
    ids[:] = torch.tensor([1, 2], dtype=torch.int32)
    ids[::2, 1], weights[::2, 1] = 0, 0.0
    ids[3], weights[3] = 0, -0.0
    huge = packed.experts.global_scales2.clone()
    huge[0] = torch.inf
    experts = dataclasses.replace(packed.experts, global_scales2=huge)
    out = emulated.run(x, experts, ids, weights, gate_of(bench.gates[0]))
    if not out.isfinite().all():
        return "output is not finite"
    if out[3].count_nonzero():
        return "a token of no expert has an output"
    truth = packed.truth(x, ids, weights, bench.gates[0])
    return "" if error(out, truth + 1e-30).whole < 2 * bench.bound else "wrong output"


CASES = (
    lambda bench, emulated: ordinary(bench, emulated, 4),
    lambda bench, emulated: ordinary(bench, emulated, 40),
    with_nan,
    with_weights_of_zero,
    without_w2s_biases,
)


def said(bench: Bench, emulated: Emulated) -> Iterator[str]:
    """By all of the above, one after the other."""
    for case in CASES[: None if bench.form.biased else -1]:
        try:
            yield case(bench, emulated)
        except AssertionError as wrong:
            yield str(wrong)


def test_each_fault_is_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(said(bench, bench.emulated(monkeypatch))) == {""}
    for name, mutant in bench.mutants.items():
        texts = said(bench, bench.emulated(monkeypatch, name))
        assert any(re.search(mutant.said, text) for text in texts), name


@pytest.mark.parametrize("gate", ["silu", "relu2"])
def test_the_references_of_faults_are_far_from_the_right_one(gate: str) -> None:
    """What no fault in the source can be made to do: a bias that is not weighted by the router. And
    what the biases come to, so that one left out cannot pass for a rounding."""
    shape = Shape("small", 4, 128, 128, 2, RELU2 if gate == "relu2" else GATES["silu"])
    packed = Packed.random(shape, CPU, biased=True)
    x, ids, weights = packed.batch(20)
    truth = packed.truth(x, ids, weights, gate)
    bias13, bias2 = packed.biases
    assert bias13 is not None and bias2 is not None
    unweighted = packed._replace(biases=(bias13, None)).truth(x, ids, weights, gate)
    unweighted += bias2[ids.long()].sum(1)
    for wrong in (
        unweighted,
        packed._replace(biases=(None, bias2)).truth(x, ids, weights, gate),
        packed._replace(biases=(bias13, None)).truth(x, ids, weights, gate),
    ):
        assert error(wrong, truth).whole > 5 * BOUND
