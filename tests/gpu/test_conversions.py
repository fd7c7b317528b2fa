"""Conversions that need a GPU or FlashInfer itself: into each kernel's layout and back, bit by bit.

The layouts are those of kernels for Blackwell; making them takes no such GPU.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from tests.plugin.blackwell import RELU2
from tests.plugin.conversions import (
    EXPERTS,
    Experts,
    bits,
    marlin_codes,
    marlin_scales,
    nibbles,
    padded,
    unshuffled,
    unswizzled,
)


def needed(module: str) -> Any:
    """``module``, which vLLM's CUDA build brings; without it the test is skipped."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return pytest.skip(f"needs {module}, and that cannot be imported here: {error}")


def up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@pytest.mark.parametrize("sizes", [(256, 128), (512, 192), (320, 96), (1024, 48)], ids=str)
def test_trtllm(sizes: tuple[int, int]) -> None:
    """Rows of up and gate alternate and are then shuffled, block scales also tiled; all of it is
    padded to multiples of 256 of the hidden size and of 64 of the intermediate one."""
    needed("flashinfer.fused_moe.core")
    experts = Experts.random(*sizes, device="cuda")
    layer, tensors = experts.converted("FLASHINFER_TRTLLM")
    w13, w13_scale, w13_global, inputs, w2, w2_scale, w2_global, w2_inputs = tensors
    hidden, inner = up(sizes[0], 256), up(sizes[1], 64)
    for got, gate, up_, columns in (
        (unshuffled(w13), experts.gate, experts.up, hidden // 2),
        (unshuffled(unswizzled(w13_scale)), experts.gate_scale, experts.up_scale, hidden // 16),
    ):
        assert got.shape == (EXPERTS, 2 * inner, columns)
        assert torch.equal(bits(got[:, 0::2].contiguous()), padded(up_, inner, columns))
        assert torch.equal(bits(got[:, 1::2].contiguous()), padded(gate, inner, columns))
    assert torch.equal(unshuffled(w2), padded(experts.down, hidden, inner // 2))
    want = padded(experts.down_scale, hidden, inner // 16)
    assert torch.equal(unshuffled(unswizzled(w2_scale)), want)
    assert torch.equal(w13_global, experts.w13_global)
    assert torch.equal(w2_global, experts.down_global)
    assert inputs.tolist() == w2_inputs.tolist() == [2.0] * EXPERTS
    config = layer.moe_config
    assert (config.hidden_dim, config.intermediate_size_per_partition) == (hidden, inner)
    assert config.hidden_dim_unpadded == sizes[0]


@pytest.mark.parametrize("sizes", [(256, 128), (320, 96), (1024, 48)], ids=str)
def test_trtllm_without_a_gate(sizes: tuple[int, int]) -> None:
    """Rows shuffled, but none alternate; padded to multiples of 128 of the intermediate size."""
    needed("flashinfer.fused_moe.core")
    experts = Experts.random(*sizes, device="cuda")
    layer, tensors = experts.converted("FLASHINFER_TRTLLM", RELU2)
    w13, w13_scale, _, _, w2, w2_scale, _, _ = tensors
    hidden, inner = up(sizes[0], 256), up(sizes[1], 128)
    assert torch.equal(unshuffled(w13), padded(experts.up, inner, hidden // 2))
    want = padded(experts.up_scale, inner, hidden // 16)
    assert torch.equal(unshuffled(unswizzled(w13_scale)), want)
    assert torch.equal(unshuffled(w2), padded(experts.down, hidden, inner // 2))
    want = padded(experts.down_scale, hidden, inner // 16)
    assert torch.equal(unshuffled(unswizzled(w2_scale)), want)
    config = layer.moe_config
    assert (config.hidden_dim, config.intermediate_size_per_partition) == (hidden, inner)


@pytest.mark.parametrize("sizes", [(256, 128), (320, 208)], ids=str)
def test_cutedsl_scales_as_its_kernel_indexes_them(sizes: tuple[int, int]) -> None:
    """By (row in 32, which 32 of 128, band of 128, column in 4, which 4, expert)."""
    needed("flashinfer.cute_dsl.utils")
    flashinfer_fp4 = importlib.import_module(
        "vllm.model_executor.layers.quantization.utils.flashinfer_fp4_moe"
    )
    experts = Experts.random(*sizes, device="cuda")
    _, tensors = experts.converted("FLASHINFER_CUTEDSL")
    view = flashinfer_fp4.nvfp4_swizzled_scale_to_cutedsl_mma_view(tensors[5]).view(torch.uint8)
    want = padded(experts.down_scale, up(sizes[0], 256), up(sizes[1], 64) // 16)
    row = torch.arange(want.shape[1], device="cuda").unsqueeze(1)
    column = torch.arange(want.shape[2], device="cuda")
    for expert in range(EXPERTS):
        got = view[row % 32, row % 128 // 32, row // 128, column % 4, column // 4, expert]
        assert torch.equal(got, want[expert])


@pytest.mark.parametrize("backend", ["VLLM_CUTLASS", "FLASHINFER_CUTLASS"])
def test_tiled_on_the_gpu(backend: str) -> None:
    """As in tests/plugin/test_blackwell_conversions.py, here with vLLM's move to the GPU."""
    experts = Experts.random(448, 192, device="cuda")
    _, (w13, w13_scale, *_) = experts.converted(backend)
    halves = [(experts.gate, experts.gate_scale), (experts.up, experts.up_scale)]
    if backend == "FLASHINFER_CUTLASS":
        halves.reverse()
    assert w13_scale.is_cuda
    assert torch.equal(w13, torch.cat([codes for codes, _ in halves], 1))
    want = torch.cat([bits(scales) for _, scales in halves], 1)
    assert torch.equal(unswizzled(w13_scale), want)


@pytest.mark.parametrize("largest", [0x7E, 0x38])
@pytest.mark.parametrize("sizes", [(256, 128), (128, 48), (192, 64)], ids=str)
def test_marlin(sizes: tuple[int, int], largest: int) -> None:
    """Codes repacked by vLLM's CUDA kernel; scales below 2^-6 become zero beside one of 448."""
    hidden, inner = sizes
    experts = Experts.random(hidden, inner, device="cuda", largest=largest)
    _, (w13, w13_scale, w13_global, _, w2, w2_scale, _, _) = experts.converted("MARLIN")
    grown = up(inner, 64 if hidden % 128 == 0 else 128)
    first = [padded(codes, grown, hidden // 2) for codes in (experts.gate, experts.up)]
    first_scale = [padded(s, grown, hidden // 16) for s in (experts.gate_scale, experts.up_scale)]
    codes = torch.cat(first, 1), padded(experts.down, hidden, grown // 2)
    scales = torch.cat(first_scale, 1), padded(experts.down_scale, hidden, grown // 16)
    factor = float((experts.w13_global * 2.0**119 / w13_global)[0])
    assert factor == {0x7E: 1, 0x38: 256}[largest]
    for expert in range(EXPERTS):
        for got, want in zip((w13, w2), codes, strict=True):
            rows, columns = want.shape[1], 2 * want.shape[2]
            assert torch.equal(marlin_codes(got[expert], rows, columns), nibbles(want[expert]))
        for got, want in zip((w13_scale, w2_scale), scales, strict=True):
            value = want[expert].view(torch.float8_e4m3fn).float()
            value[value * factor < 2**-6] = 0
            assert torch.equal(marlin_scales(got[expert], factor), value)
