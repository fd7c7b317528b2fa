"""``python -m vllm_nvfp4_moe.build``: compiles all kernels before any server needs one.

It needs the compilers and no GPU. What it makes serves any process that loads the same version of
this package: one of another user, with a file system that is read-only and without a compiler. No
size of a model is compiled in, so no checkpoint has to be named.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from quantize.cli.signals import INTERRUPTED, end_at_once, interrupting

if __name__ == "__main__":
    end_at_once()  # as long as nothing is begun; imports take a while

from quantize.native import environment, jit
from quantize.native.jit import KernelError, Language


@dataclass(frozen=True)
class Unit:
    """One library.

    Attributes:
        name: for people.
        needed: whether it is an error if it cannot be made; else the kernels do without it.
    """

    name: str
    source: str
    language: Language
    needed: bool = True


def cuda() -> Iterator[Unit]:
    """All that ``HopperKernel.library`` may ask for."""
    from vllm_nvfp4_moe.kernels.hopper.kernel import ARCHITECTURE
    from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS
    from vllm_nvfp4_moe.kernels.hopper.source import FORMS

    for kernel in KERNELS.values():
        for form in FORMS:
            name = f"{kernel.name}, {'gated' if form.gated else 'ungated'}"
            name += " with biases" if form.biased else ""
            yield Unit(name, kernel.source(form), jit.cuda(ARCHITECTURE))


def cpu() -> Iterator[Unit]:
    """All that experts and the quantizer may ask for on a CPU. An old compiler does not know the
    newest instructions; the last set, which comes last, is within those of the others."""
    from quantize.nvfp4.kernels import cpp_cpu
    from vllm_nvfp4_moe.kernels.cpu import operators
    from vllm_nvfp4_moe.kernels.cpu.kernel import VARIANTS

    yield Unit("CPU, what PyTorch calls", *operators.source())
    for variant in VARIANTS:
        name = f"CPU, {variant.instructions.name}"
        yield Unit(name, variant.source(), variant.language, variant == VARIANTS[-1])
    for instructions in cpp_cpu.INSTRUCTIONS:
        last = instructions == cpp_cpu.INSTRUCTIONS[-1]
        yield Unit(f"quantizing, {instructions.name}", *cpp_cpu.source(instructions), last)


def make(unit: Unit, folder: Path) -> str | None:
    """Make the unit's library in ``folder`` unless one is there that loads, and print a line; the
    reason why it cannot be made, None if it could."""
    library = folder / jit.file_name(unit.source, unit.language)
    begin, done = time.perf_counter(), "is there"
    try:
        if not _loads(library):
            jit.build(unit.source, unit.language, library)
            try:
                ctypes.CDLL(str(library))
            except OSError:
                library.unlink()
                raise
            done = f"{time.perf_counter() - begin:.0f} s"
    except (KernelError, OSError) as error:
        return " ".join(str(error).split())
    print(f"{unit.name}: {library} ({done})", flush=True)
    return None


def _make_all(units: Sequence[Unit], folder: Path) -> list[str | None]:
    """What :func:`make` says of each. If this is interrupted, no compiler goes on."""
    over = False

    def one(unit: Unit) -> str | None:
        return None if over else make(unit, folder)

    with ThreadPoolExecutor(min(len(units), os.cpu_count() or 1)) as pool:
        tasks = [pool.submit(one, unit) for unit in units]
        try:
            return [task.result() for task in tasks]
        except BaseException:
            over = True
            while not all(task.done() for task in tasks):  # one may be about to start another
                jit.end_compilers()
                time.sleep(0.05)
            raise


def _loads(library: Path) -> bool:
    try:
        return library.exists() and ctypes.CDLL(str(library)) is not None
    except OSError:
        return False


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status: 1 if a kernel that is needed could not be made."""
    parser = argparse.ArgumentParser("python -m vllm_nvfp4_moe.build", description=__doc__)
    parser.add_argument("--cuda", action="store_true", help="kernels for Hopper GPUs, by nvcc")
    parser.add_argument("--cpu", action="store_true", help="kernels for x86 CPUs, by g++")
    parser.add_argument(
        "--to", type=Path, metavar="DIR", help=f"where to, by default where a server of this user "
        f"looks ({environment.CACHE}). A server looks in DIR if {environment.CACHE} names it",
    )  # fmt: skip
    asked = parser.parse_args(arguments)
    everything = not (asked.cuda or asked.cpu)
    try:
        folder = asked.to.absolute() if asked.to else environment.cache()
    except ImportError:  # vLLM, which knows where its cache is
        folder = None
    if folder is None:
        parser.error("there is no folder for caches here: say one by --to")
    try:
        jit.make_folder(folder)
        jit.check_safe(folder)
    except OSError as error:
        parser.error(f"{error}. No server takes code from there")
    units = [*(cuda() if asked.cuda or everything else ())]
    if asked.cpu or (everything and platform.machine() in ("x86_64", "AMD64")):
        units += cpu()
    try:
        with interrupting():
            found = _make_all(units, folder)
    except KeyboardInterrupt:
        print("interrupted: what was made stays, and the same command goes on", file=sys.stderr)
        return INTERRUPTED
    left = {unit: problem for unit, problem in zip(units, found, strict=True) if problem}
    for problem in dict.fromkeys(left.values()):
        names = "; ".join(unit.name for unit in left if left[unit] == problem)
        print(f"Not made: {names}: {problem}", file=sys.stderr)
    return int(any(unit.needed for unit in left))


if __name__ == "__main__":
    sys.exit(main())
