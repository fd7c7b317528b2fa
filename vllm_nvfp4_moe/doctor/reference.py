"""What a layer's experts should give, in plain float32 arithmetic, and what they would give if one
of the known faults were in a kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch

from quantize.experts.gates import Gate
from quantize.nvfp4.activations import round_nvfp4, round_rows_e4m3
from quantize.nvfp4.format import E2M1_MAX, E4M3_MAX, dequantize
from vllm_nvfp4_moe.doctor.cases import Weights
from vllm_nvfp4_moe.doctor.inputs import Batch, Stored


class Rounding(NamedTuple):
    """How a kernel rounds what goes into its products.

    Attributes:
        nvfp4: activations to NVFP4, by the checkpoint's input scales.
        by_expert: each expert by its own input scale; else by the largest.
        e4m3: activations to E4M3 with a scale for each token, weights to E4M3 (:func:`e4m3`), and
            what the gate gives first to bfloat16: as Hopper's kernel with FP8.
        stored: what goes into the gate, what it gives, and what activations are rounded to, to
            bfloat16: vLLM's emulation, which keeps all three in memory. Without that the reference
            would round other numbers than the kernel, and some to other codes, which differ by up
            to a third.

    By default the reference does not round. The more of a kernel's roundings it has, the smaller
    the faults that stand out of the rest.
    """

    nvfp4: bool = False
    by_expert: bool = False
    e4m3: bool = False
    stored: bool = False


def e4m3(stored: Stored, expert: int) -> torch.Tensor:
    """One expert's weights as a kernel that multiplies in E4M3 has them, float32 ``[out, in]``.

    The whole expert is shifted by the power of two that makes it as large as E4M3 holds: its
    largest scale, times E2M1's largest, comes under 464, which is rounded to 448. Each weight then
    goes to the nearest. Only for scales that are more than 2^-10 of the largest, as those of
    ``random_weights`` are: ``kernels/hopper/fp8_weights.py`` raises smaller ones first.
    """
    codes, scales, global_scale = (part[expert] for part in stored)
    weight = dequantize(codes, scales, torch.ones_like(global_scale))
    most = E4M3_MAX + 16  # half a step above
    shift = 2.0 ** math.floor(math.log2(most / (E2M1_MAX * float(scales.float().max()))))
    rounded = (weight * shift).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()
    return rounded * (global_scale / shift)


@dataclass(frozen=True)
class Fault:
    """What a kernel may do wrong with all experts alike.

    Attributes:
        name: in words; empty for no fault.
        gate: that is applied instead of the layer's.
        swapped: gate and up are taken for each other.
        factors: of the router's weights float32 ``[tokens, k]``, what is used instead.
        other_scales: the input scales are not those that the kernel is known to take.
        biases: which of w13's and w2's are added.
    """

    name: str = ""
    gate: Gate | None = None
    swapped: bool = False
    factors: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda weights: weights)
    other_scales: bool = False
    biases: tuple[bool, bool] = (True, True)


RIGHT = Fault()


def faults(weights: Weights, rounding: Rounding) -> Iterator[Fault]:
    """All that may be tried on this layer."""
    gate = weights.shape.gate
    for other in dict.fromkeys(_other_gates(gate)):
        if other != gate:
            yield Fault(f"the gate {other} in place of {gate}", gate=other)
    if gate.gated:
        yield Fault("gate and up swapped: one's half of w13 is taken for the other's", swapped=True)
    yield Fault("the router's weights left out: each expert counts fully", factors=torch.ones_like)
    yield Fault(
        "the router's weights left out: a token's experts count alike",
        factors=lambda weights: torch.full_like(weights, 1 / weights.shape[1]),
    )
    if rounding.nvfp4:
        whose = "the largest" if rounding.by_expert else "each expert's own"
        yield Fault(f"other input scales: {whose}", other_scales=True)
    if weights.biases is not None:
        yield Fault("w13's biases left out", biases=(False, True))
        yield Fault("w2's biases left out", biases=(True, False))


def _other_gates(gate: Gate) -> Iterator[Gate]:
    """Gates that an engine may apply by mistake in place of ``gate``."""
    if not gate.gated:
        yield Gate("relu")
        return
    yield from (Gate("silu"), Gate("gelu"), Gate("gelu_tanh"))
    yield Gate("swiglu_oai", 1.702, 1.0, gate.limit or 7.0)
    yield replace(gate, alpha=1.0)
    yield replace(gate, beta=0.0)
    yield replace(gate, limit=None)


class Expert:
    """One expert's weights in float32, and its tokens of a batch."""

    def __init__(self, weights: Weights, number: int, given: Batch, rounding: Rounding) -> None:
        self.number = number
        self.token, self.slot = (given.ids == number).nonzero(as_tuple=True)
        self.factor = given.weights[self.token, self.slot].unsqueeze(1)
        self._weights, self._rounding = weights, rounding
        self.biases: list[torch.Tensor | None] = [None, None]
        if weights.biases is not None:
            self.biases = [bias[number].float() for bias in weights.biases]
        self.scales: list[torch.Tensor] | None = None
        if rounding.nvfp4:
            by_expert = rounding.by_expert
            self.scales = [s[number] if by_expert else s.max() for s in weights.input_scales]
        self.gate = weights.shape.gate
        self.x = given.x[self.token].float()

    @cached_property
    def w13(self) -> torch.Tensor:
        """Float32 ``[rows, hidden]``, as it is multiplied by."""
        return self._matrix(self._weights.w13)

    @cached_property
    def w2(self) -> torch.Tensor:
        """Float32 ``[hidden, intermediate]``, as it is multiplied by."""
        return self._matrix(self._weights.w2)

    def _matrix(self, stored: Stored) -> torch.Tensor:
        return e4m3(stored, self.number) if self._rounding.e4m3 else stored.weight(self.number)

    def other(self, weights: Weights, rounding: Rounding) -> list[torch.Tensor]:
        """The input scales that it should not take."""
        return [s.max() if rounding.by_expert else s[self.number] for s in weights.input_scales]

    def pre(self, scales: list[torch.Tensor] | None = None, biased: bool = True) -> torch.Tensor:
        """What goes into the gate, ``[tokens, rows of w13]``."""
        pre, bias = self.rounded(self.x, 0, scales) @ self.w13.T, self.biases[0]
        pre = pre if bias is None or not biased else pre + bias
        return pre.bfloat16().float() if self._rounding.stored else pre

    def seen(self, middle: torch.Tensor, scales: list[torch.Tensor] | None = None) -> torch.Tensor:
        """What goes into the second product, from what the gate gave."""
        if self._rounding.e4m3 or self._rounding.stored:
            middle = middle.bfloat16().float()
        return self.rounded(middle, 1, scales)

    def rounded(
        self, values: torch.Tensor, product: int, scales: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """What goes into a product (0, 1) of float32 ``[tokens, columns]``."""
        scales = scales or self.scales
        if self._rounding.e4m3:
            return round_rows_e4m3(values)
        if scales is None:
            return values
        kept = values.bfloat16() if self._rounding.stored else values
        return round_nvfp4(kept, scales[product]).float()

    def output(
        self,
        middle: torch.Tensor,
        scales: list[torch.Tensor] | None = None,
        biased: bool = True,
    ) -> torch.Tensor:
        """The expert's output ``[tokens, hidden]``, without the router's weight."""
        out, bias = self.seen(middle, scales) @ self.w2.T, self.biases[1]
        return out if bias is None or not biased else out + bias

    def under(self, fault: Fault, weights: Weights, rounding: Rounding) -> torch.Tensor:
        """The same with ``fault``."""
        scales = self.other(weights, rounding) if fault.other_scales else None
        pre = self.pre(scales, fault.biases[0])
        if fault.swapped:
            pre = torch.cat(pre.chunk(2, -1)[::-1], -1)
        middle = (fault.gate or self.gate).apply_stacked(pre)
        return self.output(middle, scales, fault.biases[1])


def experts_of(weights: Weights, given: Batch, rounding: Rounding) -> Iterator[Expert]:
    """Each expert that a token goes to; one after the other, since they take memory."""
    for number in given.ids.unique().tolist():
        yield Expert(weights, number, given, rounding)


def outputs(
    weights: Weights, given: Batch, rounding: Rounding, assumed: Sequence[Fault] = (RIGHT,)
) -> list[torch.Tensor]:
    """The layer's output float32 ``[tokens, hidden]`` under each of ``assumed``."""
    sums = [torch.zeros_like(given.x, dtype=torch.float32) for _ in assumed]
    factors = [fault.factors(given.weights) for fault in assumed]
    for expert in experts_of(weights, given, rounding):
        for fault, factor, total in zip(assumed, factors, sums, strict=True):
            out = expert.under(fault, weights, rounding)
            used = factor[expert.token, expert.slot].unsqueeze(1)
            total.index_add_(0, expert.token, out * used)
    return sums
