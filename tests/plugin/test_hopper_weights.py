"""Weights for the bf16 Hopper kernel, read back as its threads read them; and how kernels compile.

The reading is written from PTX's and bf16's definitions; of the package it takes only what packs.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantize.native import jit
from tests.gpu.reference import Stored
from vllm_nvfp4_moe import settings
from vllm_nvfp4_moe.kernels.hopper import bf16_weights
from vllm_nvfp4_moe.kernels.hopper.bf16_weights import Rows
from vllm_nvfp4_moe.kernels.hopper.kernel import HopperKernel
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS
from vllm_nvfp4_moe.kernels.hopper.source import Form


def bf16(bits: torch.Tensor) -> torch.Tensor:
    """Values, float64, of the bf16 numbers in the lower 16 bits."""
    return (bits & 0xFFFF).to(torch.int32).bitwise_left_shift(16).view(torch.float32).double()


def registers(word: int) -> list[int]:
    """The four A registers before scaling, as `dequantize` in bf16.cu makes them."""
    whole = 0x81C081C0
    return [
        word & whole,
        (word << 3) & whole,
        (word << 6) & whole,
        (((word >> 8) & 0x006C006C) * 0x421) & whole,
    ]


def held(chunk: torch.Tensor) -> torch.Tensor:
    """A chunk's weights ``[64, 64]`` times 2^-52, float64, as 128 threads make them of it."""
    codes = chunk[:2048].view(torch.int32).view(128, 4).tolist()
    scales = chunk[2048:].view(torch.int32).view(32, 2).tolist()
    rows, columns, values, factors = [], [], [], []
    for thread in range(128):
        warp, g, q = thread // 32, thread % 32 // 4, thread % 4
        for mma in range(4):
            pair = scales[8 * warp + g][mma // 2] & 0xFFFFFFFF
            if mma % 2:
                pair = (pair & 0x00FF00FF) << 8 | pair >> 8 & 0x00FF00FF
            pair = pair & 0x0FF00FF0 | 0x60006000
            for i, register in enumerate(registers(codes[thread][mma] & 0xFFFFFFFF)):
                for half in range(2):
                    # PTX: of a thread's 8 elements, two to a register, the rows of registers 1 and
                    # 3 are 8 further down, the columns of 2 and 3 are 8 to the right.
                    rows.append(16 * warp + g + 8 * (i % 2))
                    columns.append(16 * mma + 2 * q + half + 8 * (i // 2))
                    values.append(register >> 16 * half)
                    factors.append(pair >> 16 * (i % 2))
    product = bf16(torch.tensor(values)) * bf16(torch.tensor(factors))
    # In the kernel a product is rounded to bf16: it must be one.
    assert torch.equal(product.bfloat16().double(), product)
    weights = torch.full((64, 64), torch.nan, dtype=torch.float64)
    weights[torch.tensor(rows), torch.tensor(columns)] = product
    return weights


def read(packed: torch.Tensor) -> torch.Tensor:
    """All of ``[row tiles, chunks, bytes]``."""
    tiles = [torch.cat([held(chunk) for chunk in tile], 1) for tile in packed]
    return torch.cat(tiles) * 2.0**52


def stored(rows: int, columns: int) -> Stored:
    """One expert; every code, and every block scale from zero up, subnormals too."""
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(256, (1, rows, columns // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(
        0x7F, (1, rows, columns // 16), dtype=torch.uint8, generator=generator
    ).view(torch.float8_e4m3fn)
    return Stored(codes, scales, torch.ones(1))


@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (128, 384), (48, 64), (80, 208)])
def test_a_thread_finds_its_weights(rows: int, columns: int) -> None:
    matrix = stored(rows, columns)
    found = read(bf16_weights.pack(matrix.codes[0], matrix.block_scale[0]))
    truth = matrix.weight(0, torch.float64)
    assert torch.equal(found[:rows, :columns], truth)
    assert found.shape == (-(-rows // 64) * 64, -(-columns // 128) * 128)
    assert found[rows:].count_nonzero() == found[:, columns:].count_nonzero() == 0


def test_every_scale_and_code() -> None:
    """127 scales by 16 codes, each once."""
    codes = torch.arange(16).repeat(128, 8).to(torch.uint8)
    scales = torch.arange(128).clamp(max=0x7E).to(torch.uint8).view(torch.float8_e4m3fn)
    packed = bf16_weights.pack(codes[:, 0::2] | codes[:, 1::2] << 4, scales[:, None].repeat(1, 8))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    assert torch.equal(
        read(packed), scales.double()[:, None] * torch.cat((values, -values)).repeat(8)
    )


@pytest.mark.parametrize("intermediate", [128, 96, 80])
def test_gate_and_up_meet_in_a_thread(intermediate: int) -> None:
    """Row g of a warp's 16 is gate's, row g + 8 the same row of up; padding gives nothing."""
    matrix = stored(2 * intermediate, 128)
    found = read(bf16_weights.pack_experts(matrix.codes, matrix.block_scale, Rows.GATE_AND_UP)[0])
    truth = matrix.weight(0, torch.float64)
    warps = found.unflatten(0, (-1, 2, 8))
    gate, up = warps[:, 0].flatten(0, 1), warps[:, 1].flatten(0, 1)
    assert torch.equal(gate[:intermediate], truth[:intermediate])
    assert torch.equal(up[:intermediate], truth[intermediate:])
    assert len(gate) == (intermediate + 31) // 32 * 32
    assert gate[intermediate:].count_nonzero() == up[intermediate:].count_nonzero() == 0


def test_experts_stay_apart() -> None:
    first, second = stored(64, 128), stored(128, 128)
    # Of each 16 rows the MMA's are in an order of their own.
    order = [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    codes = torch.cat([first.codes, second.codes[:, 64:]])
    scales = torch.cat(
        [m.view(torch.uint8) for m in (first.block_scale, second.block_scale[:, 64:])]
    )
    packed = bf16_weights.pack_experts(codes, scales.view(torch.float8_e4m3fn), Rows.OF_ONE)
    for expert in range(2):
        matrix = Stored(codes, scales.view(torch.float8_e4m3fn), torch.ones(2))
        weight = matrix.weight(expert, torch.float64)
        assert torch.equal(
            read(packed[expert]), weight.unflatten(0, (-1, 16))[:, order].flatten(0, 1)
        )


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("rows", Rows)
def test_a_rank_without_experts(kernel: HopperKernel, rows: Rows) -> None:
    """As with more ranks than experts: shapes are those of a rank that has some."""
    codes = torch.zeros(2, 96, 40, dtype=torch.uint8)
    scales = torch.ones(2, 96, 5).to(torch.float8_e4m3fn)
    some, some_scales = kernel.pack_matrix(codes, scales, torch.ones(2), rows)
    none, no_scales = kernel.pack_matrix(codes[:0], scales[:0], torch.ones(0), rows)
    assert none.shape == (0, *some.shape[1:])
    assert no_scales.shape == (0,) and some_scales.shape == (2,)


@pytest.fixture(scope="module")
def compiler() -> Path:
    try:
        return jit.nvcc()
    except jit.KernelError as error:
        pytest.skip(f"CUDA sources cannot be compiled here: {error}")


# Of each epilogue; experts with biases and without a gate have parts of both.
@pytest.mark.parametrize("form", [Form(), Form(gated=False), Form(biased=True)], ids=str)
@pytest.mark.parametrize(("name", "count"), [("bf16", 12), ("fp8", 10)])
def test_the_kernels_compile_without_spills(
    name: str, count: int, form: Form, compiler: Path, tmp_path: Path
) -> None:
    """Nor does ptxas run MMAs one after another, as it does where registers get in their way."""
    file = tmp_path / "kernel.cu"
    file.write_text(KERNELS[name].source(form))
    target = "arch=compute_90a,code=sm_90a"
    done = subprocess.run(
        [compiler, "-std=c++17", "-O3", "-gencode", target, "-Xptxas", "-v", "-cubin",
         "-o", tmp_path / "kernel.cubin", file],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spilled = re.findall(r"(\d+) bytes spill stores", done.stderr)
    assert len(spilled) == count
    assert set(spilled) == {"0"}
    assert "serialized" not in done.stderr


STAND_IN = f"""#!{sys.executable}
# What jit.py asks nvcc for, by g++.
import os, sys
words = sys.argv[1:]
if words != ["--version"]:
    at = words.index("-gencode")
    del words[at : at + 2]
    at = words.index("-Xcompiler")
    words[at : at + 2] = words[at + 1].split(",")
    words = ["-x", "c++", "-D__global__=", *words]
os.execvp("g++", ["g++", *words])
"""


@pytest.fixture
def any_compiler(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvcc, or where there is none something that takes its words: enough for sources without
    kernels."""
    try:
        jit.nvcc()
    except jit.KernelError:
        home = tmp_path_factory.mktemp("cuda")
        file = home / "bin" / "nvcc"
        file.parent.mkdir()
        file.write_text(STAND_IN)
        file.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(home))


def test_a_librarys_symbols_are_hidden_unless_exported(
    any_compiler: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two kernels' libraries have functions of the same names."""
    monkeypatch.setenv(settings.CACHE, str(tmp_path))
    exported = '__attribute__((visibility("default")))'
    loaded = jit.load(
        'extern "C" __global__ void kernel() {} extern "C" int hidden() { return 1; } '
        f'extern "C" {exported} int answer() {{ return hidden() + (&kernel != nullptr); }}',
        jit.cuda("90a"),
    )
    assert loaded.answer() == 2
    assert not hasattr(loaded, "hidden")
    assert not hasattr(loaded, "kernel")
