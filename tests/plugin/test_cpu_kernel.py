"""The CPU's kernel in C++, with each instruction set that this host has, beside plain floats."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.experts.gates import Gate
from quantize.native import jit, processor
from tests.conftest import ROOT
from tests.plugin.reference import dequantize, m3_gate, relu2, routed
from tests.plugin.test_layer import OTHER_GATES, relative, routing
from vllm_nvfp4_moe import settings
from vllm_nvfp4_moe.backends.cpu import forward, huge_pages, kernels
from vllm_nvfp4_moe.doctor import run as doctor
from vllm_nvfp4_moe.kernels.cpu import kernel as cpu
from vllm_nvfp4_moe.kernels.cpu.kernel import ANY, FORMS, VARIANTS, Kernel, Variant


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
GATES = {
    (Gate("swiglu_oai", 1.702, 1.0, 7.0)): m3_gate,
    (Gate("relu2")): relu2,
    **{Gate(form, alpha, 0.0, limit): what for (form, alpha, limit), what in OTHER_GATES.items()},
}


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


def bound(kernel: Kernel) -> float:
    """Of the relative error: with bfloat16 what is between the products is rounded to it."""
    return 4e-3 if kernel.variant.takes == (torch.bfloat16,) else 2e-6


# Sizes: less than what is decoded at a time; a whole number of it; and with a rest of some blocks.
@pytest.mark.parametrize(("hidden", "inner"), [(16, 48), (256, 128), (400, 144), (144, 784)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 90])
def test_as_plain_floats(kernel: Kernel, hidden: int, inner: int, tokens: int) -> None:
    torch.manual_seed(hidden + tokens)
    case, (weights, ids) = Case(hidden, inner), routing(tokens, EXPERTS, TOP_K)
    gate = Gate("swiglu_oai", 1.702, 1.0, 7.0)
    for dtype in kernel.variant.takes:
        x = torch.randn(tokens, hidden).to(dtype)
        out = case.run(kernel, x, weights, ids, gate)
        assert out.dtype == torch.float32
        assert relative(out, routed(x, case.plain, weights, ids)) < bound(kernel), dtype


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_each_gate(kernel: Kernel, gate: Gate) -> None:
    torch.manual_seed(1)
    case, (weights, ids) = Case(80, 176, gate.gated), routing(9, EXPERTS, TOP_K)
    x = torch.randn(9, 80).bfloat16() * 6
    out = case.run(kernel, x, weights, ids, gate)
    assert relative(out, routed(x, case.plain, weights, ids, GATES[gate])) < bound(kernel)


def test_all_forms_are_here() -> None:
    assert {gate.form for gate in GATES} == set(FORMS)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("on_input", [True, False])
def test_biases_and_experts_elsewhere(kernel: Kernel, gated: bool, on_input: bool) -> None:
    torch.manual_seed(2)
    case = Case(48, 80, gated, biased=True)
    expert_map = torch.tensor([3, -1, 0, 1, -1, 2, 4], dtype=torch.int32)
    weights, ids = routing(11, len(expert_map), 3)
    x = torch.randn(11, 48).bfloat16()
    gate = Gate("silu") if gated else Gate("relu2")
    out = case.run(kernel, x, weights, ids, gate, expert_map, on_input)
    truth = torch.zeros(11, 48, dtype=torch.float64)
    for token in range(11):
        for weight, expert in zip(
            weights[token].double(), expert_map[ids[token].long()], strict=True
        ):
            if expert < 0:
                continue
            *first, down = case.plain[expert]
            row = x[token].double() * (weight if on_input else 1)
            parts = case.b13[expert].double().chunk(1 + gated)
            products = [m @ row + bias for m, bias in zip(first, parts, strict=True)]
            middle = (OTHER_GATES["silu", 1.0, None] if gated else relu2)(*products)
            own = down @ middle + case.b2[expert].double()
            truth[token] += own * (1 if on_input else weight)
    assert relative(out, truth) < bound(kernel)


def test_every_code_and_every_scale(kernel: Kernel) -> None:
    """Exactly. Token t picks column t of w2: the first product gives it a 1 there, and zeros."""
    size = 128
    rows, blocks = torch.arange(size)[:, None], torch.arange(size // 16)[None]
    bits = (rows // 8 * 8 + blocks).clamp(max=126)  # of all scales that are not negative nor NaN
    scales = bits.byte().view(torch.float8_e4m3fn)
    numbers = (2 * (rows % 8) + torch.arange(size)[None]) % 16
    codes = (numbers[:, 0::2] | numbers[:, 1::2] << 4).byte()
    one = torch.zeros(size, size, dtype=torch.long)
    one.fill_diagonal_(2)  # the code of 1.0
    first = (one[:, 0::2] | one[:, 1::2] << 4).byte()
    ones = torch.ones(1)
    out = kernel.run(
        torch.eye(size).bfloat16(), first[None], torch.ones(1, size, size // 16).to(scales.dtype),
        ones, codes[None], scales[None], ones, torch.ones(size, 1),
        torch.zeros(size, 1, dtype=torch.int32), None, Gate("relu2"), False, None, None,
    )  # fmt: skip
    assert len(set(bits.flatten().tolist())) == 127
    assert torch.equal(out.T.double(), dequantize(codes, scales, ones))


def test_between_the_products_ties_go_to_even(kernel: Kernel) -> None:
    """1.0625 squared lies in the middle between two bfloat16 numbers."""
    x = torch.full((1, 16), 0.0)
    x[0, 0] = 1.0625
    one = torch.zeros(16, 8, dtype=torch.uint8)
    one[0, 0] = 2  # the code of 1.0, of row 0 and column 0
    scales = torch.ones(1, 16, 1).to(torch.float8_e4m3fn)
    ones, expert = torch.ones(1), torch.zeros(1, 1, dtype=torch.int32)
    out = kernel.run(
        x.bfloat16(), one[None], scales, ones, one[None], scales, ones, ones[None], expert, None,
        Gate("relu2"), False, None, None,
    )  # fmt: skip
    squared = torch.tensor(1.0625**2)
    rounds = kernel.variant.takes == (torch.bfloat16,)
    assert out[0, 0] == (squared.bfloat16() if rounds else squared)


def test_the_same_bits_whatever_the_neighbours_and_threads(kernel: Kernel) -> None:
    torch.manual_seed(3)
    case, (weights, ids) = Case(272, 144), routing(70, EXPERTS, TOP_K)
    x, gate = torch.randn(70, 272).bfloat16(), Gate("silu")
    whole = case.run(kernel, x, weights, ids, gate)
    alone = [
        case.run(kernel, *(each[i : i + 1] for each in (x, weights, ids)), gate) for i in range(70)
    ]
    if kernel.variant.invariant:
        assert torch.equal(torch.cat(alone), whole)
    else:  # the order of sums is another; then what is between the products may round differently
        assert not torch.equal(torch.cat(alone), whole)
        assert relative(torch.cat(alone), whole) < bound(kernel)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(case.run(kernel, x, weights, ids, gate), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_gate_that_the_loops_do_not_have(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library multiplies then, in an order of its own for each number of tokens; but not where
    vLLM is to be invariant of the batch."""
    assert "relu" not in FORMS
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    torch.manual_seed(7)
    case, (weights, ids) = Case(272, 144, gated=False), routing(70, EXPERTS, TOP_K)
    x = torch.randn(70, 272).to(dtype)

    def run(*given: torch.Tensor) -> torch.Tensor:
        rows, factors, chosen = given
        return forward.experts_forward(
            rows, case.w13, case.s13, case.g13, case.w2, case.s2, case.g2, factors, chosen, None,
            "relu", 1.0, 0.0, None, False,
        )  # fmt: skip

    whole = run(x, weights, ids)
    truth = routed(x, case.plain, weights, ids, lambda up: up.clamp(min=0))
    assert relative(whole, truth) < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    alone = [run(*(each[i : i + 1] for each in (x, weights, ids))) for i in range(70)]
    assert torch.equal(torch.cat(alone), whole)


def test_without_proc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (kernels, doctor):
        monkeypatch.setattr(module, "Path", lambda _: tmp_path / "missing")
    assert kernels._cores() == os.sched_getaffinity(0)
    assert doctor._available() == 4 << 30


def test_other_defaults_of_pytorch(kernel: Kernel) -> None:
    """vLLM loads under the model's dtype and device as defaults, and kernels run then, too."""
    torch.manual_seed(6)
    case, (weights, ids) = Case(48, 32), routing(7, EXPERTS, TOP_K)
    x = torch.randn(7, 48).bfloat16()
    want = case.run(kernel, x, weights, ids, Gate("silu"))
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            out = case.run(kernel, x, weights, ids, Gate("silu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype == torch.float32
    assert torch.equal(out, want)


def test_nothing_to_do(kernel: Kernel) -> None:
    case, none = Case(16, 16), torch.zeros(0, 2)
    assert case.run(kernel, torch.zeros(0, 16), none, none.int(), Gate("silu")).shape == (0, 16)
    elsewhere = torch.full((EXPERTS,), -1, dtype=torch.int32)
    weights, ids = routing(3, EXPERTS, TOP_K)
    out = case.run(kernel, torch.randn(3, 16), weights, ids, Gate("silu"), elsewhere)
    assert not out.any()


def test_infinite_activations_stay_so(kernel: Kernel) -> None:
    """What a model makes of them is its own; zeros beyond the last column must not become NaN."""
    case = Case(16, 16)
    x = torch.zeros(2, 16).bfloat16()
    x[0, 3] = float("inf")
    ids = torch.zeros(2, 1, dtype=torch.int32)
    out = case.run(kernel, x, torch.ones(2, 1), ids, Gate("silu"))
    assert not out[0].isfinite().any()
    assert not out[1].any()


def test_an_expert_that_there_is_not(kernel: Kernel) -> None:
    case = Case(16, 16)
    ids = torch.tensor([[0, EXPERTS]], dtype=torch.int32)
    numbers = [None, torch.arange(EXPERTS, dtype=torch.int32)]
    for expert_map in numbers:
        with pytest.raises(RuntimeError, match=f"an expert beyond the last of {EXPERTS}"):
            case.run(kernel, torch.zeros(1, 16), torch.ones(1, 2), ids, Gate("silu"), expert_map)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "w13",
            lambda t: t.mT.contiguous().mT,
            r"w13: uint8 \[5, 32, 8\] where uint8 \[5, 32, 8\] in C order",
        ),
        ("w13", lambda t: t[:, :16].contiguous(), r"\[5, 16, 8\] where uint8 \[5, 32, 8\]"),
        ("g2", lambda t: t.double(), r"w2_global: another dtype \[5\] where float32"),
        ("g13", lambda t: t[:2], r"\[2\] where float32 \[5\]"),
        ("s13", lambda t: t.view(torch.uint8), "where float8_e4m3fn"),
        (
            "s2",
            lambda t: t[:, :8].contiguous(),
            r"\[5, 8, 1\] where float8_e4m3fn \[5, 16, 1\]",
        ),
        ("w2", lambda t: t[:, :8].contiguous(), r"\[5, 8, 8\] where uint8 \[5, 16, 8\]"),
        ("b13", lambda t: t[:, :16].contiguous(), r"\[5, 16\] where float32 \[5, 32\]"),
        ("b2", lambda t: t[:1], r"\[1, 16\] where float32 \[5, 16\]"),
    ],
)
def test_what_is_not_as_the_loops_take_it(
    kernel: Kernel, name: str, change: Callable[[torch.Tensor], torch.Tensor], said: str
) -> None:
    case, (weights, ids) = Case(16, 16, biased=True), routing(1, EXPERTS, TOP_K)
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(RuntimeError, match=said):
        case.run(kernel, torch.zeros(1, 16), weights, ids, Gate("silu"))


def test_what_does_not_fit_the_weights(kernel: Kernel) -> None:
    case, (weights, ids) = Case(16, 16), routing(1, EXPERTS, TOP_K)
    x, silu = torch.zeros(1, 16), Gate("silu")
    with pytest.raises(RuntimeError, match=r"\[5, 32, 8\] where uint8 \[5, 32, 16\]"):
        case.run(kernel, torch.zeros(1, 32), weights, ids, silu)
    with pytest.raises(RuntimeError, match="int64"):
        case.run(kernel, x, weights, ids, silu, torch.arange(EXPERTS))
    with pytest.raises(RuntimeError, match=r"topk_ids: int32 \[1, 2\] where int32 \[2, 2\]"):
        case.run(kernel, torch.zeros(2, 16), weights, ids, silu)
    with pytest.raises(
        RuntimeError, match=r"topk_weights: float32 \[1, 1\] where float32 \[1, 2\]"
    ):
        case.run(kernel, x, weights[:, :1], ids, silu)
    with pytest.raises(RuntimeError, match=r"\[5, 32, 8\] where uint8 \[5, 16, 8\]"):
        case.run(kernel, x, weights, ids, Gate("relu2"))
    with pytest.raises(
        RuntimeError, match="rows of 24 and 16 columns are no whole number of blocks"
    ):
        case.run(kernel, torch.zeros(1, 24), weights, ids, silu)


@pytest.fixture
def chosen_anew() -> Iterator[None]:
    forward.native.cache_clear()
    cpu.kernel_for.cache_clear()
    yield
    forward.native.cache_clear()
    cpu.kernel_for.cache_clear()


@pytest.mark.usefixtures("chosen_anew")
def test_the_fastest_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for best in NATIVE:
        monkeypatch.setattr(processor, "flags", lambda: best.instructions.flags)  # noqa: B023
        for dtype in ANY:
            cpu.kernel_for.cache_clear()
            invariant = cpu.kernel_for(dtype, invariant=True).variant
            assert invariant.invariant
            assert dtype in invariant.takes
            found = cpu.kernel_for(dtype).variant
            assert dtype in found.takes
            assert found.instructions.flags <= best.instructions.flags
            assert found is best or dtype not in best.takes


@pytest.mark.usefixtures("chosen_anew")
def test_a_compiler_that_does_not_know_the_newest_instructions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """g++ 9 and BF16: the next best are taken, and not numba."""
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *bf16*) echo "unrecognized" >&2; exit 1;; esac\n'
        'exec /usr/bin/env -u CXX g++ "$@"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv(settings.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first = VARIANTS[0].instructions.flags
    monkeypatch.setattr(processor, "flags", lambda: first)
    assert cpu.kernel_for(torch.bfloat16).variant is VARIANTS[2]
    monkeypatch.setattr(cpu, "VARIANTS", VARIANTS[:2])
    with pytest.raises(jit.KernelError, match="unrecognized"):
        cpu.kernel_for.__wrapped__(torch.bfloat16)


@pytest.mark.usefixtures("chosen_anew")
@pytest.mark.parametrize("lacks", ["AVX2", "a compiler", "the wish"])
def test_without_it_numba_does_the_work(
    lacks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With one line that says why."""
    said: list[str] = []
    monkeypatch.setattr(forward.logger, "warning", lambda text, *args: said.append(text % args))
    if lacks == "AVX2":
        monkeypatch.setattr(processor, "flags", frozenset)
    elif lacks == "a compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setenv(settings.CACHE, str(tmp_path))  # which is empty
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    else:
        monkeypatch.setenv(settings.CPP, "0")
    torch.manual_seed(4)
    case, (weights, ids) = Case(48, 32), routing(6, EXPERTS, TOP_K)
    x = torch.randn(6, 48)
    for _ in range(2):
        out = forward.experts_forward(
            x, case.w13, case.s13, case.g13, case.w2, case.s2, case.g2, weights, ids, None,
            "silu", 1.0, 0.0, None, False,
        )  # fmt: skip
        truth = routed(x, case.plain, weights, ids, OTHER_GATES["silu", 1.0, None])
        assert relative(out, truth) < 1e-5
    why = {"AVX2": "the processor has no AVX2", "a compiler": "no C++ compiler"}
    assert len(said) == (lacks in why)
    assert all(line.startswith("numba runs the experts") and why[lacks] in line for line in said)


def test_pytorchs_threads_are_used() -> None:
    """No second OpenMP comes into the process, and PyTorch's has as many threads as it is told."""
    code = """
import os, torch
from quantize.experts.gates import Gate
from vllm_nvfp4_moe.kernels.cpu.kernel import kernel_for
from tests.plugin.test_cpu_kernel import Case, routing
def tasks(): return len(os.listdir("/proc/self/task"))
def runtimes(): return {l.split()[-1] for l in open("/proc/self/maps") if "omp" in l.split()[-1]}
torch.set_num_threads(3)
torch.randn(1000, 1000) @ torch.randn(1000, 1000); torch.randn(10**6).exp()
before = tasks(), runtimes()
case, (weights, ids) = Case(256, 256), routing(9, 5, 2)
case.run(kernel_for(torch.bfloat16), torch.randn(9, 256).bfloat16(), weights, ids, Gate("silu"))
print(before == (tasks(), runtimes()), before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("True"), done.stdout


def test_what_its_own_arithmetic_is_worth(kernel: Kernel) -> None:
    """A kernel that takes scales of a neighbouring block is far outside of the bound."""
    torch.manual_seed(5)
    case, (weights, ids) = Case(64, 64), routing(4, EXPERTS, TOP_K)
    x: Any = torch.randn(4, 64).bfloat16()
    truth = routed(x, case.plain, weights, ids, OTHER_GATES["silu", 1.0, None])
    case.s2 = case.s2.view(torch.uint8).roll(1, -1).view(case.s2.dtype).contiguous()
    assert relative(case.run(kernel, x, weights, ids, Gate("silu")), truth) > 100 * bound(kernel)


def test_huge_pages() -> None:
    """Where the kernel of Linux has them, weights lie in them."""
    has = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    tensor = torch.empty(64 << 20, dtype=torch.uint8)  # not from what was freed before
    asked = huge_pages.advise(tensor)
    assert asked == (has.exists() and "[never]" not in has.read_text())
    tensor.fill_(1)
    sizes, inside = {}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *rest = line.split()
        if "-" in name and not name.endswith(":"):
            begin, end = (int(part, 16) for part in name.split("-"))
            inside = begin <= tensor.data_ptr() + (32 << 20) < end
        elif inside:
            sizes[name] = int(rest[0]) if rest[0].isdigit() else 0
    assert (sizes["AnonHugePages:"] > 0) == asked
    assert not huge_pages.advise(torch.empty(1 << 20, dtype=torch.uint8))


def test_the_compiler_knows_that_tiles_are_read(tmp_path: Path) -> None:
    """g++ 12 takes its own macros for AMX not to read memory. No processor with AMX is needed."""
    code = """
extern "C" void product(const __m512i* from, float* to) {
    alignas(64) __m512i rows[16];
    tile_zero(0);
    for (int c = 0; c < 8; c++) {
        for (int r = 0; r < 16; r++) rows[r] = _mm512_slli_epi16(from[16 * c + r], 1);
        tile_load(1, rows);
        tile_multiply(0, 1, 2);
    }
    tile_store(0, to);
}
"""
    source = tmp_path / "tiles.cpp"
    source.write_text((Path(cpu.__file__).parent / "tiles.h").read_text() + code)
    options = [option for option in VARIANTS[0].language.options if option != "-c"]
    command = [*jit.cxx(), *options, "-S", "-o", "-", source]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unrecognized" in done.stderr:
        pytest.skip("an old compiler")
    before, load, _ = done.stdout.partition("\ttileloadd\t")
    assert load
    assert re.search(r"\tvmov\w+\t%zmm\d+, -?\d*\(%r", before)


def test_instructions_that_linux_does_not_give() -> None:
    """As AMX's, if a container's rules do not let a process ask for them."""

    class Refused(Variant):
        def source(self) -> str:
            text = super().source()
            assert "allowed() { return 1; }" in text
            return text.replace("allowed() { return 1; }", "allowed() { return 0; }")

    last = NATIVE[-1]
    with pytest.raises(jit.KernelError, match="Linux does not let this process use AVX2"):
        Kernel(Refused(last.instructions, last.header, last.takes))
