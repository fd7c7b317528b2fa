"""NVFP4 experts in C++ with vector instructions, compiled for this host's at first use.

Each instruction set is a header beside ``experts.cpp`` and an entry of :data:`VARIANTS`.
Threads are those of PyTorch's OpenMP: a library has OpenMP's calls, and finds the runtime that
PyTorch has loaded. So they are on the cores to which vLLM has bound them.
"""

from __future__ import annotations

import ctypes
import math
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from quantize.experts.gates import Gate
from quantize.native import jit
from quantize.native.jit import KernelError
from quantize.native.processor import AMX, AVX2, AVX512, AVX512_BF16, Instructions, flags
from quantize.nvfp4.format import BLOCK

FORMS = {
    "silu": 0, "swiglu_oai": 0, "gelu": 1, "gelu_tanh": 2, "swiglu_step": 3, "relu2": 4, "situ": 5,
}  # fmt: skip
"""The forms of gate that ``activate`` in experts.cpp has, by their numbers there."""


@dataclass(frozen=True)
class Variant:
    """The loops for a set of instructions.

    Attributes:
        header: what the instructions do for the loops of ``experts.cpp``.
        takes: the dtypes of the model's activations that it is for. What experts compute between
            their products has this dtype too, or float32.
        invariant: a token's output has the same bits whatever its neighbours. If not, it depends on
            how many tokens its experts have, in the order in which sums are added.
    """

    instructions: Instructions
    header: str
    takes: tuple[torch.dtype, ...]
    invariant: bool = True

    @property
    def language(self) -> jit.Language:
        """How the source is compiled."""
        return jit.cpp(*self.instructions.options, openmp=True)

    def source(self) -> str:
        """The whole C++ source."""
        return _inlined("experts.cpp").replace('#include "vectors.h"\n', _inlined(self.header))


def _inlined(name: str) -> str:
    """The text of a file, with this folder's headers in the place of their includes."""
    text = Path(__file__).with_name(name).read_text()
    return re.sub(
        r'^#include "(?!vectors)(.*)"\n', lambda found: _inlined(found[1]), text, flags=re.M
    )


ANY = (torch.bfloat16, torch.float16, torch.float32)
VARIANTS = (
    Variant(AMX, "amx.h", (torch.bfloat16,), invariant=False),
    Variant(AVX512_BF16, "avx512_bf16.h", (torch.bfloat16,)),
    Variant(AVX512, "avx512.h", ANY),
    Variant(AVX2, "avx2.h", ANY),
)
"""The fastest first."""


class Work(ctypes.Structure):
    """Mirrors ``Work`` in experts.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (
            "tokens", "slots", "hidden", "inner", "experts", "gated", "x_is_float",
            "weight_on_input", "known",
        )),
        *((name, ctypes.c_void_p) for name in (
            "x", "ids", "local", "weights", "w13", "s13", "w2", "s2", "g13", "g2", "b13", "b2",
            "inputs", "middle", "output", "routed", "start", "pairs",
        )),
        ("form", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("alpha", "beta", "limit")),
    ]  # fmt: skip


class Kernel:
    """The compiled loops of a variant.

    Raises:
        KernelError: if they cannot be compiled or loaded here.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self._library = jit.load(variant.source(), variant.language)
        self._columns: int = self._library.columns()
        self._input = torch.bfloat16 if self._library.size_of_input() == 2 else torch.float32
        if (theirs := self._library.size_of_work()) != (ours := ctypes.sizeof(Work)):
            raise KernelError(f"experts.cpp and kernel.py differ: {theirs} bytes and {ours}")
        if not self._library.allowed():
            raise KernelError(f"Linux does not let this process use {variant.instructions.name}")

    def run(
        self,
        x: torch.Tensor,
        w13: torch.Tensor,
        w13_scale: torch.Tensor,
        w13_global: torch.Tensor,
        w2: torch.Tensor,
        w2_scale: torch.Tensor,
        w2_global: torch.Tensor,
        weights: torch.Tensor,
        ids: torch.Tensor,
        expert_map: torch.Tensor | None,
        gate: Gate,
        weight_on_input: bool,
        w13_bias: torch.Tensor | None,
        w2_bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """The routed experts' output, float32 ``[tokens, hidden]``.

        A token's output has the same bits whatever other tokens there are, if ``variant`` says so.

        Args:
            x: ``[tokens, hidden]``, of a dtype that ``variant`` takes.
            weights: float32 ``[tokens, k]``.
            ids: int32 ``[tokens, k]``.
            gate: of a form in :data:`FORMS`.
            The rest: see ``backends.cpu.forward.experts_forward``.

        Raises:
            ValueError: if a token is sent to an expert that there is not, or a tensor has another
                dtype or shape.
        """
        (tokens, hidden), slots = x.shape, ids.shape[1]
        inner, experts = 2 * w2.shape[2], len(w2)
        rows = inner * (1 + gate.gated)
        plain = x if x.dtype == torch.bfloat16 else x.float()
        inputs = [t.contiguous() for t in (plain, ids.int(), weights.float())]
        known = 0 if expert_map is None else len(expert_map)
        code, scale, real = torch.uint8, torch.float8_e4m3fn, torch.float32
        taken = (
            (w13, code, (experts, rows, hidden // 2)),
            (w13_scale, scale, (experts, rows, hidden // BLOCK)),
            (w2, code, (experts, hidden, inner // 2)),
            (w2_scale, scale, (experts, hidden, inner // BLOCK)),
            (w13_global, real, (experts,)),
            (w2_global, real, (experts,)),
            (expert_map, torch.int32, (known,)),
            (w13_bias, real, (experts, rows)),
            (w2_bias, real, (experts, hidden)),
        )
        if hidden % BLOCK or inner % BLOCK:
            raise ValueError(f"rows of {hidden} and {inner} columns are no whole number of blocks")
        if len(ids) != tokens or weights.shape != ids.shape:
            raise ValueError(
                f"{tokens} tokens, ids {list(ids.shape)}, weights {list(weights.shape)}"
            )
        for tensor, dtype, shape in taken:
            if tensor is not None and not (
                tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous()
            ):
                raise ValueError(
                    f"{tensor.dtype} {list(tensor.shape)} where {dtype} {list(shape)} in C is taken"
                )
        made = [self._room(tokens, hidden), self._room(ids.numel(), inner)]
        # vLLM loads under the model's dtype and device as defaults.
        output = torch.zeros(tokens, hidden, dtype=torch.float32, device="cpu")
        lengths = [experts, experts + 1, ids.numel()]
        counts = torch.empty(sum(lengths), dtype=torch.int64, device="cpu").split(lengths)
        at = [None if t is None else t.data_ptr() for t in (*inputs, *(t for t, _, _ in taken))]
        x_at, ids_at, weights_at, *weight_at, map_at, b13, b2 = at
        work = Work(
            tokens, slots, hidden, inner, experts, gate.gated, plain.dtype == torch.float32,
            weight_on_input, known, x_at, ids_at, map_at, weights_at, *weight_at, b13, b2,
            *(t.data_ptr() for t in (*made, output, *counts)),
            FORMS[gate.form], gate.alpha, gate.beta,
            math.inf if gate.limit is None else gate.limit,
        )  # fmt: skip
        if self._library.run(ctypes.byref(work)):
            raise ValueError(f"a token is sent to an expert beyond the last of {experts}")
        return output

    def _room(self, rows: int, columns: int) -> torch.Tensor:
        """Rows for a product's inputs, with zeros beyond the last column."""
        wide = -(-columns // self._columns) * self._columns
        new = torch.empty if wide == columns else torch.zeros
        return new(rows, wide, dtype=self._input, device="cpu")


def lacking(variant: Variant) -> str | None:
    """Why this host's processor cannot run it, None if it can."""
    instructions = variant.instructions
    if instructions.here:
        return None
    missing = sorted(instructions.flags - flags())
    return f"the processor has no {', '.join(missing) or instructions.name}"


@cache
def kernel_named(name: str) -> Kernel:
    """The kernel of the variant with instructions of that name.

    Raises:
        KernelError: if it cannot be compiled or loaded here.
    """
    (variant,) = (each for each in VARIANTS if each.instructions.name == name)
    if problem := lacking(variant):
        raise KernelError(f"the loops for {name} cannot run here: {problem}")
    return Kernel(variant)


@cache
def kernel_for(dtype: torch.dtype, invariant: bool = False) -> Kernel:
    """The fastest kernel that this host has for activations of ``dtype``, and that can be had: an
    old compiler does not know the newest instructions.

    Args:
        invariant: whether a token's bits must not depend on its neighbours.

    Raises:
        KernelError: if there is none: the processor lacks AVX2, or there is no compiler.
    """
    fit = (v for v in VARIANTS if dtype in v.takes and v.invariant >= invariant)
    kernel = jit.first_made((v for v in fit if v.instructions.here), Kernel)
    if kernel is None:
        raise KernelError("the processor has no AVX2")
    return kernel
