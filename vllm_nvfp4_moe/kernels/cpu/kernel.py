"""NVFP4 experts in C++ with vector instructions, compiled for this host's at first use.

Each instruction set is a header beside ``experts.cpp`` and an entry of :data:`VARIANTS`.
Threads are those of PyTorch's OpenMP: a library has OpenMP's calls, and finds the runtime that
PyTorch has loaded. So they are on the cores to which vLLM has bound them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch

from quantize.experts.gates import Gate
from quantize.native import jit
from quantize.native.jit import KernelError
from quantize.native.processor import AMX, AVX2, AVX512, AVX512_BF16, Instructions, flags
from vllm_nvfp4_moe.kernels.cpu import operators
from vllm_nvfp4_moe.kernels.cpu.source import inlined

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
        return inlined("experts.cpp").replace('#include "vectors.h"\n', inlined(self.header))


ANY = (torch.bfloat16, torch.float16, torch.float32)
VARIANTS = (
    Variant(AMX, "amx.h", (torch.bfloat16,), invariant=False),
    Variant(AVX512_BF16, "avx512_bf16.h", (torch.bfloat16,)),
    Variant(AVX512, "avx512.h", ANY),
    Variant(AVX2, "avx2.h", ANY),
)
"""The fastest first."""


class Kernel:
    """The compiled loops of a variant.

    Attributes:
        number: what operators call it in this process.

    Raises:
        KernelError: if they cannot be compiled or loaded here.
    """

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self._library = jit.load(variant.source(), variant.language)
        if not self._library.allowed():
            raise KernelError(f"Linux does not let this process use {variant.instructions.name}")
        self.number: int = operators.load().use(self._library.run)
        if self.number < 0:
            raise KernelError("this process has too many kernels for experts")
        self._choice = choice([(math.inf, self)])

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
            RuntimeError: if a token is sent to an expert that there is not, or a tensor has another
                dtype or shape.
        """
        # vLLM loads under the model's dtype and device as defaults.
        output = torch.empty(x.shape, dtype=torch.float32, device="cpu")
        torch.ops.vllm_nvfp4_moe.experts(
            output, x.contiguous(), w13, w13_scale, w13_global, w2, w2_scale, w2_global,
            weights.float().contiguous(), ids.int().contiguous(),
            expert_map, w13_bias, w2_bias, self._choice,
            FORMS[gate.form], gate.alpha, gate.beta,
            math.inf if gate.limit is None else gate.limit, weight_on_input,
        )  # fmt: skip
        return output


def choice(by_tokens: Iterable[tuple[float, Kernel]]) -> torch.Tensor:
    """Which kernel takes a call, as the operator reads it: int64 ``[kernels, 2]``.

    Args:
        by_tokens: up to how many tokens, and the kernel; in ascending order.
    """
    most = torch.iinfo(torch.int64).max
    lines = [[most if up_to == math.inf else int(up_to), k.number] for up_to, k in by_tokens]
    return torch.tensor(lines, dtype=torch.int64, device="cpu")


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
