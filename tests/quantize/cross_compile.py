"""Compiling Triton kernels for a GPU that is not there: do they compile, and do registers do?

Triton brings ptxas with it.
"""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

H200 = GPUTarget("cuda", 90, 32)


class Usage(NamedTuple):
    """What a thread takes: registers, and bytes that it spills from them to memory; and the bytes
    of shared memory that a program takes."""

    registers: int
    spilled: int
    shared: int


def usage(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], folder: Path, **options: Any
) -> Usage:
    """Compile a kernel for an H200.

    Args:
        types: of all arguments but constants, as Triton writes them: ``*fp32``, ``i32``.
        folder: for files.
    """
    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=H200, options=options)
    file = folder / "kernel.ptx"
    file.write_text(binary.asm["ptx"])
    said = subprocess.run(
        [
            get_ptxas(90).path,
            "-v",
            "--gpu-name",
            "sm_90a",
            str(file),
            "-o",
            str(folder / "kernel.cubin"),
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    registers = re.search(r"Used (\d+) registers", said)
    assert spilled and registers, said
    return Usage(int(registers[1]), max(map(int, spilled.groups())), binary.metadata.shared)
