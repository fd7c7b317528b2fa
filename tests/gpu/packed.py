"""Random experts, as stored and as a Hopper kernel wants them, and what they give in floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from quantize.experts.gates import Gate
from tests.gpu.layer import PREACTIVATION, Shape, batch, random_weights
from tests.gpu.reference import Biases, Stored, routed
from vllm_nvfp4_moe.kernels.hopper.kernel import Experts, HopperKernel
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

GATES = {"silu": Gate("silu"), "swiglu_oai": Gate("swiglu_oai", 1.702, 1.0, 7.0)}
RELU2 = Gate("relu2")

BOUND = 6e-3
"""Of the relative error. Weights are exact, sums in float32; what lies between the GEMMs and each
expert's output are rounded to bf16, 2^-9 each at most."""


def random_biases(w13: Stored, w2: Stored, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Of sizes that show: as large as half of what they are added to."""
    generator = torch.Generator(w13.codes.device).manual_seed(seed)

    def draw(of: Stored, size: float) -> torch.Tensor:
        shape, device = of.codes.shape[:2], of.codes.device
        return size * torch.randn(shape, device=device, generator=generator)

    return draw(w13, PREACTIVATION / 2), draw(w2, 0.5)


def pack(
    kernel: HopperKernel, gated: bool, w13: Stored, w2: Stored, biases: Biases = (None, None)
) -> Experts:
    """As :meth:`HopperKernel.pack`. Without a gate the second half of ``w13`` and of its biases is
    not there (``reference.relu2``)."""
    rows = w13.codes.shape[1] // (1 if gated else 2)
    first = (w13.codes[:, :rows], w13.block_scale[:, :rows], w13.global_scale)
    bias13, bias2 = biases
    bias13 = None if bias13 is None else bias13[:, :rows]
    return kernel.pack(*first, *w2, gated=gated, bias13=bias13, bias2=bias2)


class Packed(NamedTuple):
    """A shape's weights. ``biases`` are float32 ``[experts, out]``, as a checkpoint has them."""

    shape: Shape
    w13: Stored
    w2: Stored
    kernel: HopperKernel
    experts: Experts
    rule: Callable[..., torch.Tensor]
    biases: Biases = (None, None)

    @classmethod
    def random(
        cls,
        shape: Shape,
        device: torch.device,
        kernel: HopperKernel = KERNELS["bf16"],
        rule: Callable[..., torch.Tensor] = routed,
        biased: bool = False,
    ) -> Packed:
        """For ``kernel``, which is to give what ``rule`` does, whose arguments are ``routed``'s."""
        w13, w2 = random_weights(shape, device)
        biases = random_biases(w13, w2) if biased else (None, None)
        return cls.of(shape, w13, w2, kernel, rule, biases)

    @classmethod
    def of(
        cls,
        shape: Shape,
        w13: Stored,
        w2: Stored,
        kernel: HopperKernel,
        rule: Callable[..., torch.Tensor],
        biases: Biases,
    ) -> Packed:
        """These weights, packed."""
        packed = pack(kernel, shape.gate.gated, w13, w2, biases)
        return cls(shape, w13, w2, kernel, packed, rule, biases)

    def like(self, shape: Shape) -> Packed:
        """The same of another shape."""
        biased = self.biases[0] is not None
        return Packed.random(shape, self.device, self.kernel, self.rule, biased)

    @property
    def device(self) -> torch.device:
        return self.w13.codes.device

    def batch(
        self, tokens: int, routing: str = "uniform", seed: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x, ids and weights, in the order in which ``run`` takes them."""
        seed = tokens if seed is None else seed
        x, weights, ids, _ = batch(self.shape, tokens, routing, self.device, torch.bfloat16, seed)
        return x, ids, weights

    def truth(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate: str = "silu"
    ) -> torch.Tensor:
        """What the kernel is to give."""
        return self.rule(x, self.w13, self.w2, weights, ids, gate, biases=self.biases)

    def exact(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate: str = "silu"
    ) -> torch.Tensor:
        """What it would give if nothing were rounded."""
        return routed(x, self.w13, self.w2, weights, ids, gate, biases=self.biases)
