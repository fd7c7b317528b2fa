"""Doctor finds faults that are put into a kernel on purpose, and names them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from quantize.experts.gates import Gate
from tests.gpu import reference, reference_fp8
from tests.gpu.broken import ZEROED_EXPERT, ZEROED_ROW, before_conversion, zero_a_scale
from tests.plugin.stand_ins import round_activations
from vllm_nvfp4_moe.backends.cpu.method import CpuMethod
from vllm_nvfp4_moe.doctor.cases import (
    Case,
    Weights,
    all_cases,
    make_batch,
    make_weights,
    together,
)
from vllm_nvfp4_moe.doctor.diagnosis import Judge, single_scale
from vllm_nvfp4_moe.doctor.inputs import Batch, Stored
from vllm_nvfp4_moe.doctor.kernels import VARIANTS, ways
from vllm_nvfp4_moe.doctor.reference import Rounding, e4m3, experts_of, outputs
from vllm_nvfp4_moe.doctor.scan import ENOUGH
from vllm_nvfp4_moe.doctor.shape import CLAMPED, Shape
from vllm_nvfp4_moe.doctor.work import Job, examine
from vllm_nvfp4_moe.self_check import BOUNDS

TINY = Shape("tiny", 8, 256, 128, 2, CLAMPED, router="sigmoid")
TOKENS = (1, 8, 64)
KERNEL = "cpu numba"


def found(
    folder: Path, shape: Shape = TINY, tokens: tuple[int, ...] = TOKENS, seconds: float = 600
) -> dict[str, list[Any]]:
    """What doctor's process finds of a kernel in so many seconds, by kind of record."""
    job = Job(
        KERNEL, ways()[KERNEL], {"whole": shape}, (("whole", VARIANTS[1]),), tokens,
        torch.device("cpu"), time.monotonic() + seconds, folder,
    )  # fmt: skip
    records: dict[str, list[Any]] = {}
    examine(job, lambda record: records.setdefault(record["what"], []).append(record))
    return records


def faults(records: dict[str, list[Any]]) -> set[str]:
    """All that it names."""
    return {r["fault"] for r in records["checked"] + records.get("compared", []) if r["fault"]}


def when_applied(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[CpuMethod, list[Any]], None]
) -> None:
    """Change the arguments of each call, or the method for it."""
    apply = CpuMethod.apply

    def changed(self: CpuMethod, *args: Any) -> torch.Tensor:
        gate, given = self.gate, [*args]
        change(self, given)
        try:
            return apply(self, *given)
        finally:
            self.gate = gate

    monkeypatch.setattr(CpuMethod, "apply", changed)


def when_converted(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Change a layer's weights, as a wrong conversion would."""
    prepare = CpuMethod.prepare

    def changed(self: CpuMethod, layer: Any) -> None:
        change(layer)
        prepare(self, layer)

    monkeypatch.setattr(CpuMethod, "prepare", changed)


SHAPES = {
    "MiniMax-M3's gate": TINY,
    "SiLU, softmax": replace(TINY, gate=Gate("silu"), router="softmax"),
    "without a gate": replace(TINY, gate=Gate("relu2")),
    "biases": replace(TINY, biased=True),
    "one block a row": replace(TINY, intermediate=16),
}


@pytest.mark.parametrize("kind", SHAPES)
def test_a_right_kernel_is_right(tmp_path: Path, kind: str) -> None:
    records = found(tmp_path, SHAPES[kind])
    assert faults(records) == set()
    assert len(records["checked"]) == 4 * len(TOKENS) and records["compared"][0]["experts"] >= 6
    assert all(r["right"] and r["token_error"] < 0.01 for r in records["checked"])
    assert [r["tokens"] for r in records["timed"]] == [*TOKENS]
    assert "left out" not in records and "failed" not in records


@pytest.mark.parametrize(
    "gate", [Gate("silu"), replace(CLAMPED, limit=None), replace(CLAMPED, beta=0.0)], ids=str
)
def test_another_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    when_applied(monkeypatch, lambda method, _: setattr(method, "gate", gate))
    assert faults(found(tmp_path)) == {f"the gate {gate} in place of {CLAMPED}"}


def test_swapped_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(layer: Any) -> None:
        for name in ("w13_weight", "w13_weight_scale"):
            data = getattr(layer, name).data.view(torch.uint8)
            data.copy_(torch.cat(data.chunk(2, 1)[::-1], 1))

    when_converted(monkeypatch, swap)
    (fault,) = faults(found(tmp_path))
    assert fault.startswith("gate and up swapped")


@pytest.mark.parametrize(
    ("value", "words"), [(1.0, "each expert counts fully"), (0.5, "a token's experts count alike")]
)
def test_router_weights_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, words: str
) -> None:
    def ignore(_: CpuMethod, given: list[Any]) -> None:
        given[2] = torch.full_like(given[2], value)

    when_applied(monkeypatch, ignore)
    assert faults(found(tmp_path)) == {f"the router's weights left out: {words}"}


@pytest.mark.parametrize(("matrix", "row"), [("w13", 5), ("w13", 128 + 77), ("w2", 200)])
def test_one_block_scale_that_is_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: str, row: int
) -> None:
    block = []

    def zero(layer: Any) -> None:
        scales = getattr(layer, f"{matrix}_weight_scale").data[6, row]
        block.append(int(scales.float().argmax()))
        scales[block[0]] = 0.0

    when_converted(monkeypatch, zero)
    named = faults(found(tmp_path))
    told = f"{matrix}'s, row {row}, block {block[0]}, is left out (counts as 0)"
    assert named == {f"a block scale of expert 6: {told}"}


def test_what_is_wrong_is_named_where_there_is_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A busy machine checks two calls; of no expert enough tokens are among them."""
    before_conversion(zero_a_scale)(monkeypatch)
    records = found(tmp_path, replace(TINY, experts=16), seconds=0)
    assert len(records["checked"]) == 2 and len(records["left out"]) == 10
    (fault,) = faults(records)
    assert fault.startswith(f"a block scale of expert {ZEROED_EXPERT}: w2's, row {ZEROED_ROW}, ")


def test_compiling_takes_no_time_from_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fresh machine --quick left most out, since a first call compiles for many seconds; and
    where it was compiled, too, since the next calls were thought to take as long as the first."""
    apply, later = CpuMethod.apply, [0.0]

    def slow_at_first(*args: Any) -> torch.Tensor:
        later[0] = later[0] or 1000.0
        return apply(*args)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + later[0])
    monkeypatch.setattr(CpuMethod, "apply", slow_at_first)
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.work.time", clock)
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.compiling.time", clock)
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.compiling.MOST", 1100.0)
    records = found(tmp_path)
    assert "left out" not in records and len(records["timed"]) == len(TOKENS)
    assert records["prepared"][0]["compiling"] == pytest.approx(1000, abs=100)
    # Within a bound: what never ends is no compiler.
    later[0] = 0.0
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.compiling.MOST", 100.0)
    assert len(found(tmp_path)["checked"]) == 2


def test_a_search_that_takes_long_costs_no_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For single wrong scales: on two cores it took 7 seconds of a --quick run's 10, and the chosen
    kernel of MiniMax-M3's layer had no times."""
    later = [0.0]

    def slow(*_: object) -> None:
        later[0] = 1000.0

    monkeypatch.setattr("vllm_nvfp4_moe.doctor.work.single_scale", slow)
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + later[0])
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.work.time", clock)
    records = found(tmp_path)
    assert later[0] and records["compared"][0]["right"]
    assert "left out" not in records and len(records["timed"]) == len(TOKENS)


@pytest.mark.parametrize("matrix", ["w13", "w2"])
def test_a_wrong_global_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: str) -> None:
    def double(layer: Any) -> None:
        getattr(layer, f"{matrix}_weight_scale_2").data[3] *= 2

    when_converted(monkeypatch, double)
    (fault,) = faults(found(tmp_path))
    assert fault.startswith(f"{matrix}'s global scale counts 2") and fault.endswith("expert 3")


@pytest.mark.parametrize("matrix", ["w13", "w2"])
def test_global_scales_of_all_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, matrix: str
) -> None:
    def change(layer: Any) -> None:
        getattr(layer, f"{matrix}_weight_scale_2").data[:] *= 0.25

    when_converted(monkeypatch, change)
    assert any(f"{matrix}'s global scale" in fault and "0.25" in fault
               for fault in faults(found(tmp_path)))  # fmt: skip


def test_biases_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    when_converted(monkeypatch, lambda layer: layer.w2_bias.data.zero_())
    assert faults(found(tmp_path, SHAPES["biases"])) == {"w2's biases left out"}


def test_a_router_that_chooses_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    select = CPURouter.select_experts

    def others(self: Any, *args: Any, **more: Any) -> Any:
        weights, ids = select(self, *args, **more)
        return weights, (ids + 1) % TINY.experts

    monkeypatch.setattr(CPURouter, "select_experts", others)
    assert faults(found(tmp_path)) == {"vLLM's router chooses other experts"}


def test_nan_and_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = CpuMethod.apply
    for value, words in ((math.nan, "NaN or infinity in"), (0.0, "zeros alone")):
        with monkeypatch.context() as within:
            within.setattr(CpuMethod, "apply", lambda *a, v=value: apply(*a) * v)
            assert all(fault.startswith(words) for fault in faults(found(tmp_path)))


def test_what_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apply = CpuMethod.apply
    monkeypatch.setattr(CpuMethod, "apply", lambda *a: apply(*a).flip(1))
    assert faults(found(tmp_path)) == {"no known fault gives this output"}


# Kernels that round, as references that share no code with doctor compute.

SMALL = Shape("small", 16, 512, 256, 4, CLAMPED, router="sigmoid")
"""Of tests/gpu/test_doctor.py."""
ROUND = {
    "bfloat16": (Rounding(), BOUNDS[16]),
    "FP8": (Rounding(e4m3=True), BOUNDS[8]),
    "NVFP4": (Rounding(nvfp4=True, stored=True), BOUNDS[4]),
}


def computed(how: str, weights: Weights, given: Batch) -> torch.Tensor:
    """What a right kernel gives that rounds like this."""
    w13, w2 = (reference.Stored(*part) for part in (weights.w13, weights.w2))
    asked = (given.x, w13, w2, given.weights, given.ids, "swiglu_oai")
    if how == "FP8":
        return reference_fp8.routed(*asked).bfloat16().float()
    emulated = how == "NVFP4"
    return reference.routed(*asked, emulated=emulated).float().bfloat16().float()


@pytest.fixture(scope="module")
def small() -> tuple[Weights, Batch]:
    """Weights whose activations have scales of one, as ``reference`` has them; a quarter of the
    tokens of --quick."""
    device = torch.device("cpu")
    ones = torch.ones(SMALL.experts)
    weights = replace(make_weights(SMALL, device), input_scales=(ones, ones))
    return weights, together(make_batch(SMALL, case, device) for case in all_cases((1, 8, 64)))


@pytest.mark.parametrize("how", ROUND)
def test_a_kernel_that_rounds_is_near_the_reference_that_does(
    small: tuple[Weights, Batch], how: str
) -> None:
    weights, given = small
    rounding, bound = ROUND[how]
    out = computed(how, weights, given)
    (truth,) = outputs(weights, given, rounding)
    judge = Judge(weights, rounding, bound)
    assert judge.right(out, truth)
    assert float((out - truth).norm() / truth.norm()) < 0.01
    assert single_scale(judge, given, out, truth) is None
    if how != "bfloat16":
        (plain,) = outputs(weights, given, Rounding())
        assert float((out - plain).norm() / plain.norm()) > 0.05


def test_weights_in_e4m3_are_those_of_another_implementation(small: tuple[Weights, Batch]) -> None:
    for stored in (small[0].w13, small[0].w2):
        for expert in (0, 5):
            codes, scales, global_scale = (part[expert] for part in stored)
            wanted = reference_fp8.rounded(codes, scales) * global_scale
            assert torch.equal(e4m3(stored, expert), wanted)
            assert not torch.equal(wanted, stored.weight(expert))


@pytest.mark.parametrize("how", ROUND)
@pytest.mark.parametrize("factor", [0.0, 2.0])
@pytest.mark.parametrize(("matrix", "row"), [("w2", ZEROED_ROW), ("w13", 5), ("w13", 256 + 99)])
def test_one_wrong_scale_stands_out_of_roundings(
    small: tuple[Weights, Batch], how: str, factor: float, matrix: str, row: int
) -> None:
    """An H200's kernel with FP8 was called right with a zeroed scale: what that changes was no more
    than what FP8 rounds, of an expert that is as small as this one beside others."""
    weights, given = small
    rounding, bound = ROUND[how]
    (truth,) = outputs(weights, given, rounding)
    right: Stored = getattr(weights, matrix)
    quiet = weights.w13.global_scale * weights.w2.global_scale
    expert = int(quiet.argsort()[len(quiet) // 3])
    scales = right.block_scale.clone()
    block = int(scales[expert, row].float().argmax())
    scales[expert, row, block] = factor * scales[expert, row, block].float()
    wrong = replace(weights, **{matrix: right._replace(block_scale=scales)})
    found = single_scale(Judge(weights, rounding, bound), given, computed(how, wrong, given), truth)
    told = "is left out (counts as 0)" if factor == 0 else "counts 2 times"
    assert (
        found == f"a block scale of expert {expert}: {matrix}'s, row {row}, block {block}, {told}"
    )


# Kernels with 4-bit activations, as which the CPU's is made to compute.


def as_four_bit(monkeypatch: pytest.MonkeyPatch, gate: Gate | None, by_expert: bool) -> None:
    round_activations(monkeypatch, gate, by_expert)
    monkeypatch.setattr(CpuMethod, "quantizes_activations", True)


@pytest.mark.parametrize("by_expert", [False, True])
def test_a_right_kernel_with_four_bit_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_expert: bool
) -> None:
    as_four_bit(monkeypatch, None, by_expert)
    monkeypatch.setattr(CpuMethod, "input_scales_by_expert", by_expert)
    records = found(tmp_path, tokens=(1, 8))
    assert faults(records) == set()
    assert records["built"][0]["activation_bits"] == 4 and records["compared"][0]["right"]


@pytest.mark.parametrize("by_expert", [False, True])
def test_input_scales_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_expert: bool
) -> None:
    """Within the bound of 4-bit activations or a little beyond, and nearer to another reference."""
    as_four_bit(monkeypatch, None, by_expert)
    monkeypatch.setattr(CpuMethod, "input_scales_by_expert", not by_expert)
    records = found(tmp_path, tokens=(1, 8))
    whose = "each expert's own" if by_expert else "the largest"
    assert faults(records) == {f"other input scales: {whose}"}


def test_one_token_that_was_rounded_another_way_is_no_wrong_scale() -> None:
    """On an H200 with few tokens, vLLM's emulation was called wrong: with 4-bit activations, a code
    on the other side changes one number of one token by much, and of an expert's few tokens, gates
    beyond their limit hide from all others what some block would change. Planted here."""
    shape = replace(TINY, experts=16, hidden=512, intermediate=256, top_k=4)
    device = torch.device("cpu")
    weights = make_weights(shape, device)
    given = make_batch(shape, Case(65, "uniform"), device)
    rounding = Rounding(nvfp4=True, by_expert=True)
    (truth,) = outputs(weights, given, rounding)
    judge = Judge(weights, rounding, BOUNDS[4])
    planted = 0
    for expert in experts_of(weights, given, rounding):
        if len(expert.token) < ENOUGH:
            continue
        pre, inner = expert.pre(), shape.intermediate
        part = (expert.x * expert.w13[inner + 9]).unflatten(-1, (-1, 16)).sum(-1)
        gate, up = pre[:, [9]], pre[:, [inner + 9]]
        change = expert.gate.apply(gate, up - 0.75 * part) - expert.gate.apply(gate, up)
        change *= expert.factor  # [tokens, blocks]
        share = change.square().amax(0) / change.square().sum(0)
        block = int(share.argmax())
        token = int(change[:, block].abs().argmax())
        noise = torch.Generator().manual_seed(expert.number)
        out = truth + 1e-3 * truth * torch.randn(truth.shape, generator=noise)
        out[expert.token[token]] += change[token, block] * expert.w2[:, 9]
        planted += float(share[block]) > 0.9
        assert single_scale(judge, given, out, truth) is None, expert.number
    assert planted


def test_another_gate_with_four_bit_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_four_bit(monkeypatch, Gate("silu"), False)
    assert f"the gate silu in place of {CLAMPED}" in faults(found(tmp_path, tokens=(1, 8)))
