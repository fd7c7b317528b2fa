"""Random experts, as stored and as a Hopper kernel wants them, and what they give in floats."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from quantize.gates import Gate
from tests.gpu.layer import Shape, batch, random_weights
from tests.gpu.reference import Stored, routed
from vllm_nvfp4_moe.kernels import hopper_moe

GATES = {"silu": Gate("silu"), "swiglu_oai": Gate("swiglu_oai", 1.702, 1.0, 7.0)}

BOUND = 6e-3
"""Of the relative error. Weights are exact, sums in float32; what lies between the GEMMs and each
expert's output are rounded to bf16, 2^-9 each at most."""


class Packed(NamedTuple):
    """A shape's weights."""

    shape: Shape
    w13: Stored
    w2: Stored
    kernels: ModuleType
    experts: Any
    rule: Callable[..., torch.Tensor]

    @classmethod
    def random(
        cls,
        shape: Shape,
        device: torch.device,
        kernels: ModuleType = hopper_moe,
        rule: Callable[..., torch.Tensor] = routed,
    ) -> Packed:
        """For ``kernels``, which are to give what ``rule`` does, arguments as ``routed``'s."""
        w13, w2 = random_weights(shape, device)
        return cls(shape, w13, w2, kernels, kernels.Experts.pack(*w13, *w2), rule)

    def like(self, shape: Shape) -> Packed:
        """The same of another shape."""
        return Packed.random(shape, self.device, self.kernels, self.rule)

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
        """What the kernels are to give."""
        return self.rule(x, self.w13, self.w2, weights, ids, gate)

    def exact(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, gate: str = "silu"
    ) -> torch.Tensor:
        """What nothing is rounded for."""
        return routed(x, self.w13, self.w2, weights, ids, gate)
