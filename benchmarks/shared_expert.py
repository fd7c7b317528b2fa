"""A shared expert beside routed experts, as vLLM runs it: on a second stream up to 256 tokens.

The kernels of the routed experts then do not have the GPU to themselves. vLLM
(``SharedExperts.maybe_forward_async``) puts the shared expert on its second stream first, then the
routed experts on the stream that it is on, waits, and adds; with more tokens than
``VLLM_SHARED_EXPERTS_STREAM_TOKEN_THRESHOLD`` one comes after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from vllm_nvfp4_moe.doctor.inputs import Batch
from vllm_nvfp4_moe.doctor.shape import Shape

STREAMED = 256
"""The most tokens for which the second stream is used: vLLM's default."""


class SharedExpert:
    """One expert in bf16, as large as a routed one (MiniMax-M3 and DeepSeek-V3 have such a one).

    Its gate is SiLU, or ReLU² where routed experts have none: an elementwise step beside two GEMMs.
    """

    def __init__(self, shape: Shape, generator: torch.Generator) -> None:
        def draw(rows: int, columns: int) -> torch.Tensor:
            device = generator.device
            noise = torch.randn(rows, columns, device=device, generator=generator)
            return (noise / math.sqrt(columns)).bfloat16()

        self.gated = shape.gate.gated
        self.first = draw((shape.matrices - 1) * shape.intermediate, shape.hidden)
        self.second = draw(shape.hidden, shape.intermediate)
        self.stream = torch.cuda.Stream() if self.first.is_cuda else None

    def __call__(self, given: Batch) -> torch.Tensor:
        """bf16 ``[tokens, hidden]``."""
        both = given.x @ self.first.T
        if self.gated and both.is_cuda:
            import vllm._custom_ops  # noqa: F401  (vLLM's SiluAndMul calls this operator)

            inner = both.new_empty(len(both), both.shape[1] // 2)
            torch.ops._C.silu_and_mul(inner, both)
        elif self.gated:
            gate, up = both.chunk(2, dim=1)
            inner = torch.nn.functional.silu(gate) * up
        else:
            inner = both.relu().square()
        return inner @ self.second.T


class Beside:
    """A layer of routed experts and a shared expert; the sum of both."""

    def __init__(self, layer: Callable[[Batch], torch.Tensor], shared: SharedExpert) -> None:
        self.layer, self.shared = layer, shared

    def __call__(self, given: Batch) -> torch.Tensor:
        """bf16 ``[tokens, hidden]``."""
        stream = self.shared.stream
        if stream is None or len(given.x) > STREAMED:
            return self.shared(given) + self.layer(given)
        here: Any = torch.cuda.current_stream()
        stream.wait_stream(here)
        with torch.cuda.stream(stream):
            aside = self.shared(given)
        out = self.layer(given)
        # Its memory is the second stream's, which waits for this one before it is used again.
        here.wait_stream(stream)
        return aside + out
