"""Whether two checkouts' Hopper kernels are the same machine code.

    python -m benchmarks.same_sass BEFORE_DIR AFTER_DIR [--keep FOLDER]

Compiles every CUDA source of both checkouts for sm_90a, disassembles it, and compares the two
kernel by kernel: the instructions with their encodings and constant-bank offsets (so that the
layout of a kernel's parameters counts), and the registers, shared memory and constant memory that
it takes. A kernel's name does not count: one that has no namesake is paired with one that has its
code. Exits with 1 if any kernel differs or has no partner. What the first checkout has no source
for, as a new form of experts, is named and not compared.

Needs nvcc and cuobjdump (of the CUDA toolkit, or Triton's), but no GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from quantize.native import jit

ARCHITECTURE = "90a"

SOURCES = """
import json
try:
    from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS
    found = {name: kernel.source() for name, kernel in KERNELS.items()}
    try:
        from vllm_nvfp4_moe.kernels.hopper.source import Form
        for form in (Form(gated=False), Form(biased=True), Form(gated=False, biased=True)):
            for name, kernel in KERNELS.items():
                found[f"{name}, {form}"] = kernel.source(form)
    except ImportError:  # before there were forms
        pass
except ImportError:  # checkouts of 2026-11-29 and before
    from vllm_nvfp4_moe.kernels import hopper_fp8, hopper_moe
    found = {"bf16": hopper_moe.source(), "fp8": hopper_fp8.source()}
print(json.dumps(found))
"""
"""Run in a checkout: its CUDA sources by name, as they go to nvcc."""


def sources(checkout: Path) -> dict[str, str]:
    """The CUDA sources of a checkout by name, whole, as its own code puts them together."""
    done = subprocess.run(
        [sys.executable, "-c", SOURCES],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{checkout}: its CUDA sources cannot be read: {done.stderr[-2000:]}")
    found: dict[str, str] = json.loads(done.stdout)
    return found


def cuobjdump() -> str:
    """The disassembler: beside nvcc, on the path, or the one that Triton brings."""
    places = [str(jit.nvcc().resolve().parent / "cuobjdump"), shutil.which("cuobjdump") or ""]
    if (triton := find_spec("triton")) and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    for place in places:
        if Path(place).is_file():
            return place
    raise SystemExit("no cuobjdump: not beside nvcc, on the path or in Triton")


def compiled(source: str, folder: Path) -> Path:
    """The cubin of a CUDA source; one that lies in ``folder`` already is not made again."""
    cubin = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:24]}.cubin"
    if not cubin.exists():
        file = cubin.with_suffix(".cu")
        file.write_text(source)
        target = f"arch=compute_{ARCHITECTURE},code=sm_{ARCHITECTURE}"
        command = [str(jit.nvcc()), "-std=c++17", "-O3", "-gencode", target, "-cubin"]
        subprocess.run([*command, "-o", str(cubin), str(file)], check=True)
    return cubin


def kernels(cubin: Path) -> dict[str, str]:
    """Each kernel's code and what it takes of the machine, by the kernel's name."""

    def listing(what: str) -> dict[str, str]:
        done = subprocess.run(
            [cuobjdump(), what, cubin], check=True, capture_output=True, text=True
        )
        parts = re.split(r"^\s*Function\s*:?\s*(\w+):?\s*$", done.stdout, flags=re.MULTILINE)
        return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}

    code, resources = listing("-sass"), listing("-res-usage")
    assert code.keys() == resources.keys() and code, f"{cubin}: no kernels in cuobjdump's listing"
    return {name: f"{resources[name]}\n{text}" for name, text in code.items()}


def compare(before: dict[str, str], after: dict[str, str]) -> list[tuple[str, str, bool]]:
    """Pairs of kernels, (name before, name after, whether they are the same); "" for none."""
    pairs = {name: name for name in before if name in after}
    rest = [name for name in after if name not in pairs]
    for name in before:
        if name not in pairs:
            twin = next((other for other in rest if after[other] == before[name]), "")
            pairs[name] = twin
            if twin:
                rest.remove(twin)
    found = [(name, twin, before[name] == after.get(twin)) for name, twin in pairs.items()]
    return found + [("", name, False) for name in rest]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--keep", type=Path, help="keep what was compiled, for the next time")
    options = parser.parse_args()
    different = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        one, other = (sources(path.resolve()) for path in (options.before, options.after))
        for file in sorted({*one, *other}):
            if file not in one:
                print(f"{file}: only in {options.after}")
                continue
            listings = [
                kernels(compiled(s[file], folder)) if file in s else {} for s in (one, other)
            ]
            for before, after, same in compare(*listings):
                name = before if before == after else f"{before or '-'} -> {after or '-'}"
                print(f"{file:6} {'same     ' if same else 'DIFFERENT'} {name}")
                different += not same
    raise SystemExit(f"{different} kernels differ" if different else 0)


if __name__ == "__main__":
    main()
