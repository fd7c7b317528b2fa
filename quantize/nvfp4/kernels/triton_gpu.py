"""The kernel for GPUs, in Triton. It gives the same bits as the reference kernel.

One lane quantizes one block of 16 weights. For every pass it reads them again, from the first-level
cache. This is fast enough, since the bus to the GPU is about ten times slower than this kernel.
Products and sums are not contracted (no fused multiply-add), and divisions are those of IEEE 754,
so every operation rounds as in the reference.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from quantize.nvfp4.format import BLOCK, NvFp4
from quantize.nvfp4.kernels.kernel import Quantized
from quantize.nvfp4.kernels.reference import ReferenceKernel
from quantize.nvfp4.kernels.triton_numbers import e4m3_bits, e4m3_value, round_e2m1
from quantize.nvfp4.scales.mse import HIGHEST, LOWEST
from quantize.nvfp4.scales.rule import ScaleRule

_LANES = 128
"""Number of blocks that one program quantizes."""

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _encode(  # type: ignore[no-untyped-def]
    source, global_scale, packed, scales, sums, blocks,
    SIZE: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr, LEAST: tl.constexpr,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    inside = block < blocks
    scale = tl.load(global_scale)
    first = source + block * SIZE

    amax = tl.zeros([LANES], tl.float32)
    for k in tl.static_range(SIZE):
        amax = tl.maximum(amax, tl.abs(tl.load(first + k, mask=inside, other=0.0).to(tl.float32)))
    ratio = tl.math.div_rn(amax, tl.zeros([LANES], tl.float32) + 6.0 * scale)
    start = e4m3_bits(tl.minimum(tl.maximum(ratio, 0.001953125), 448.0))

    chosen = start
    if BELOW + ABOVE + LEAST > 0:
        wide = tl.zeros([LANES], tl.float32) + scale
        best = tl.full([LANES], float("inf"), tl.float32)
        highest = tl.minimum(tl.maximum(start + ABOVE, LEAST), HIGHEST)
        # The max rule's own scale comes first, so that it wins ties, and takes no second turn.
        for step in range(-BELOW, tl.max(highest - start) + 1):
            offset = tl.where(step == -BELOW, 0, tl.where(step <= 0, step - 1, step))
            bits = tl.maximum(tl.minimum(start + offset, highest), LOWEST)
            value = e4m3_value(bits)
            inverse = tl.math.div_rn(tl.full([LANES], 1.0, tl.float32), value)
            error = tl.zeros([LANES], tl.float32)
            for k in tl.static_range(SIZE):
                x = tl.abs(tl.load(first + k, mask=inside, other=0.0).to(tl.float32))
                y = tl.math.div_rn(x, wide)
                lost = y - round_e2m1(y * inverse) * value
                error += lost * lost
            better = error < best
            best = tl.where(better, error, best)
            chosen = tl.where(better, bits, chosen)
    tl.store(scales + block, chosen.to(tl.uint8), mask=inside)

    value = e4m3_value(chosen)
    width = value * scale
    unit = 1.0 / scale
    noise = tl.zeros([LANES], tl.float32)
    signal = tl.zeros([LANES], tl.float32)
    for pair in tl.static_range(SIZE // 2):
        byte = tl.zeros([LANES], tl.int32)
        for half in tl.static_range(2):
            x = tl.load(first + 2 * pair + half, mask=inside, other=0.0).to(tl.float32)
            magnitude = round_e2m1(tl.math.div_rn(tl.abs(x), width))
            above = (magnitude.to(tl.int32, bitcast=True) >> 22) - 252
            code = tl.where(magnitude < 1.0, (magnitude * 2.0).to(tl.int32), above)
            sign = (x.to(tl.int32, bitcast=True) >> 31) & 1
            byte |= (code | (sign << 3)) << (4 * half)
            whole = tl.abs(x) * unit
            lost = whole - magnitude * value
            noise += lost * lost
            signal += whole * whole
        tl.store(packed + block * (SIZE // 2) + pair, byte.to(tl.uint8), mask=inside)
    tl.store(sums + 2 * tl.program_id(0), tl.sum(noise))
    tl.store(sums + 2 * tl.program_id(0) + 1, tl.sum(signal))


class TritonKernel(ReferenceKernel):
    """See ``quantize.nvfp4.kernels.kernel.Kernel``.

    It leaves dtypes outside of ``_DTYPES``, rules without ``reach``, and rows that are no whole
    number of blocks, to the reference kernel.
    """

    def encode(
        self, weight: torch.Tensor, global_scale: torch.Tensor, rule: ScaleRule
    ) -> Quantized:
        if weight.dtype not in _DTYPES or rule.reach is None or weight.shape[-1] % BLOCK:
            return super().encode(weight, global_scale, rule)
        weight = weight.contiguous()
        rows, columns = weight.shape
        device, blocks = weight.device, weight.numel() // BLOCK
        codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=device)
        block_scale = torch.empty(rows, columns // BLOCK, dtype=torch.uint8, device=device)
        programs = triton.cdiv(blocks, _LANES)
        sums = torch.empty(programs, 2, dtype=torch.float32, device=device)
        with torch.cuda.device(device):  # Triton starts kernels on the current device
            _encode[(programs,)](
                weight, global_scale, codes, block_scale, sums, blocks,
                SIZE=BLOCK, BELOW=rule.reach.below, ABOVE=rule.reach.above, LEAST=rule.reach.least,
                LOWEST=LOWEST, HIGHEST=HIGHEST, LANES=_LANES,
                num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
        counts = torch.bincount(block_scale.flatten(), minlength=127)
        # The kernel's sums are in units of the squared global scale, so that float32 can hold them.
        noise, signal = (sums.double().sum(0) * global_scale.double().square()).tolist()
        return Quantized(
            NvFp4(codes, block_scale.view(torch.float8_e4m3fn), global_scale),
            noise,
            signal,
            counts.cpu(),
        )
