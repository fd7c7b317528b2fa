"""The GPU's kernel for scale rules under Triton's interpreter, against the reference.

``test_scales_on_gpus`` runs this program, since the interpreter must be chosen before Triton is
imported.

It writes one JSON object: for each case, whether codes, block scales and counts are the same.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from unittest import mock

import torch

from quantize.nvfp4.kernels.kernel import quantize_weights
from quantize.nvfp4.kernels.reference import ReferenceKernel
from quantize.nvfp4.kernels.triton_gpu import TritonKernel


def same(weight: torch.Tensor, rule: str) -> bool:
    with mock.patch("torch.cuda.device", lambda _: nullcontext()):
        [got] = quantize_weights([weight], rule, TritonKernel())
    [want] = quantize_weights([weight], rule, ReferenceKernel())
    return (
        torch.equal(got.weight.codes, want.weight.codes)
        and torch.equal(
            got.weight.block_scale.view(torch.uint8), want.weight.block_scale.view(torch.uint8)
        )
        and torch.equal(got.counts, want.counts)
        and abs(got.noise - want.noise) <= 1e-3 * want.noise
    )


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20, 208, generator=generator) * 0.02  # 260 blocks: two and a bit of 128
    small = (
        normal * 10 ** torch.linspace(-7, 0, len(normal))[:, None]
    )  # down to the smallest scales
    small[3] = 0
    # With a global scale of 1, one of E4M3's smallest scales is right, an odd multiple of 2^-9.
    odd = torch.arange(1.0, 17)[:, None].expand(16, 16) * 2**-10
    odd = torch.cat((odd, torch.full((1, 16), 2688.0)))
    weights = {"normal": normal, "bf16": normal.bfloat16(), "down to nothing": small, "odd": odd}
    found = {
        f"{rule}, {kind}": same(weight, rule)
        for rule in ("max", "mse")
        for kind, weight in weights.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
