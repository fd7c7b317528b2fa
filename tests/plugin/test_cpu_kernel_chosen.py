"""Which of the CPU's kernels is compiled and chosen on a host, and what runs where none can be."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quantize.native import jit, processor
from tests.plugin.cpu_kernels import EXPERTS, NATIVE, TOP_K, Case
from tests.plugin.reference import routed
from tests.plugin.test_layer import OTHER_GATES, relative, routing
from tests.quantize.without_cpp import LACKS, take_away
from vllm_nvfp4_moe import settings
from vllm_nvfp4_moe.backends.cpu import forward
from vllm_nvfp4_moe.kernels.cpu import kernel as cpu
from vllm_nvfp4_moe.kernels.cpu.kernel import ANY, VARIANTS, Kernel, Variant


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
@pytest.mark.parametrize("lacks", LACKS)
def test_without_it_numba_does_the_work(
    lacks: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With one line that says why."""
    said: list[str] = []
    monkeypatch.setattr(forward.logger, "warning", lambda text, *args: said.append(text % args))
    take_away(lacks, tmp_path, monkeypatch)
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
