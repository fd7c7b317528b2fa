"""Puts a Hopper kernel's CUDA source together: its files, and the MMA wrappers that they use.

nvcc gets one text. PTX has an instruction of its own for each number of tokens of an MMA, with all
its registers as operands, so ``mma<N>`` is written here for each N that a tile may have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Form:
    """What experts compute beside two products. A library is compiled for one form: what a model
    does not have costs it nothing, neither instructions nor nvcc's time.

    Attributes:
        gated: there are gate and up; if not, there is up alone, and its activation is ``relu2``.
        biased: at least one of the two products has a bias added to it.
    """

    gated: bool = True
    biased: bool = False

    def constants(self) -> str:
        """The same in CUDA C++, which gemm.cuh and launch.cuh want before them."""
        names = {"GATED": self.gated, "BIASED": self.biased}
        said = ", ".join(f"{name} = {str(value).lower()}" for name, value in names.items())
        return f"namespace {{ constexpr bool {said}; }}\n"


ORDINARY = Form()
"""That of nearly all models."""

FORMS = tuple(Form(gated, biased) for gated in (True, False) for biased in (False, True))
"""All that there are."""


def inlined(path: Path, form: Form) -> str:
    """The text of a ``.cu`` file for experts of ``form``, with this package's headers in the place
    of their includes."""
    return form.constants() + re.sub(
        r'^#include "(\w+\.cuh)"\n',
        lambda include: path.with_name(include[1]).read_text(),
        path.read_text(),
        flags=re.MULTILINE,
    )


def whole(path: Path, form: Form, tokens: Iterable[int], element: str, columns: int) -> str:
    """The text of a ``.cu`` file as nvcc gets it.

    Args:
        form: of the experts.
        tokens: the numbers N of tokens for which it uses ``mma<N>``.
        element: PTX's name of the type of both operands' elements.
        columns: K, of that type's MMA.
    """
    declaration = (
        "#include <stdint.h>\ntemplate <int N> __device__ __forceinline__ void "
        "mma(float (&d)[N / 2], const uint32_t (&a)[4], uint32_t b);\n"
    )
    wrappers = (wgmma(n, element, columns) for n in sorted(set(tokens)))
    return declaration + "".join(wrappers) + inlined(path, form)


def wgmma(tokens: int, element: str, columns: int) -> str:
    """CUDA C++ for ``D[64, tokens] += A[64, columns] B[columns, tokens]``, with A in registers."""
    count = tokens // 2
    sums = ", ".join(f"%{i}" for i in range(count))
    a = ", ".join(f"%{count + i}" for i in range(4))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))
    inputs = ", ".join(f'"r"(a[{i}])' for i in range(4))
    transposed = ", 0" if element == "bf16" else ""  # only 16-bit types have this operand
    return (
        f"template <> __device__ __forceinline__ void mma<{tokens}>(float (&d)[{count}], "
        "const uint32_t (&a)[4], uint32_t b) {\n"
        f'asm volatile("{{.reg .b64 desc; mov.b64 desc, {{%{count + 4}, 0x40000040}};"\n'
        f'"wgmma.mma_async.sync.aligned.m64n{tokens}k{columns}.f32.{element}.{element} "\n'
        f'"{{{sums}}}, {{{a}}}, desc, 1, 1, 1{transposed};}}" '
        f': {outputs} : {inputs}, "r"(b));\n}}\n'
    )
