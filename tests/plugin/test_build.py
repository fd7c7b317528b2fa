"""``python -m vllm_nvfp4_moe.build``, and servers that have what it made and no compiler.

``nvcc`` is a script that takes any source for one that g++ can compile.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from quantize.experts.gates import Gate
from quantize.native import jit, processor
from quantize.nvfp4.kernels import cpp_cpu
from tests.conftest import ROOT
from tests.plugin.test_jit import SOURCE, as_nobody, compilations, log, tmp_path
from vllm_nvfp4_moe import build, settings
from vllm_nvfp4_moe.kernels.cpu import kernel as cpu
from vllm_nvfp4_moe.kernels.cpu import operators
from vllm_nvfp4_moe.kernels.hopper import launch
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS
from vllm_nvfp4_moe.kernels.hopper.source import Form

__all__ = ["log", "tmp_path"]  # fixtures
MonkeyPatch = pytest.MonkeyPatch

COMPILER = """#!/bin/sh
echo compiled >> "$NVCC_LOG"
for word; do
    [ "$before" = -o ] && out=$word
    before=$word
    case "$word" in "$UNKNOWN") echo "unrecognized option '$word'" >&2; exit 1;; esac
done
echo '{source}' | exec g++ -x c++ -shared -fPIC -o "$out" -
"""


@pytest.fixture
def compilers(tmp_path: Path, monkeypatch: MonkeyPatch) -> Path:
    """Both; none understands the option ``$UNKNOWN``."""
    script = tmp_path / "cuda" / "bin" / "nvcc"
    script.write_text(COMPILER.replace("{source}", SOURCE))
    monkeypatch.setenv("CXX", str(script))
    return script


def test_all_that_kernels_ask_for_is_made(monkeypatch: MonkeyPatch) -> None:
    """On each processor, for each gate that they have, with biases and without."""
    asked = set()

    def load(source: str, language: jit.Language) -> None:
        asked.add(jit.file_name(source, language))
        raise jit.KernelError("noted")

    monkeypatch.setattr(jit, "load", load)
    gates = [Gate(form) for form in launch.FORMS]
    for kernel, gate, biased in product(KERNELS.values(), gates, (True, False)):
        with pytest.raises(jit.KernelError, match="noted"):
            kernel.library(0, Form(gate.gated, biased))
    for has, dtype in product([v.instructions.flags for v in cpu.VARIANTS], cpu.ANY):
        monkeypatch.setattr(processor, "flags", lambda has=has: has)
        with pytest.raises(jit.KernelError, match="noted"):
            cpu.kernel_for.__wrapped__(dtype)
    for instructions in cpp_cpu.INSTRUCTIONS:
        with pytest.raises(jit.KernelError, match="noted"):
            cpp_cpu.CppKernel(instructions)
    with pytest.raises(jit.KernelError, match="noted"):
        operators.load.__wrapped__()
    made = [jit.file_name(unit.source, unit.language) for unit in [*build.cuda(), *build.cpu()]]
    assert len(made) == len(asked) == 15
    assert set(made) == asked


def test_the_command(
    tmp_path: Path, compilers: Path, log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "opt" / "kernels"
    made = {jit.file_name(unit.source, unit.language) for unit in [*build.cuda(), *build.cpu()]}
    before = os.umask(0o077)
    try:
        assert build.main(["--to", str(folder)]) == 0
    finally:
        os.umask(before)
    assert {path.name for path in folder.iterdir()} == made
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())} == {0o755}
    said = capsys.readouterr().out
    assert said.count("\n") == 15 and "HOPPER FP8 (vllm_nvfp4_moe), ungated with biases: " in said
    done = compilations(log)
    assert build.main(["--to", str(folder)]) == 0
    assert capsys.readouterr().out.count("(is there)") == 15
    assert compilations(log) == done


def test_a_damaged_library_is_made_again(tmp_path: Path, compilers: Path, log: Path) -> None:
    units = list(build.cpu())
    damaged = tmp_path / jit.file_name(units[0].source, units[0].language)
    damaged.write_bytes(b"\x7fELF, and no more")
    assert build.main(["--cpu", "--to", str(tmp_path)]) == 0
    assert compilations(log) == 2 * len(units)  # one to compile, one to link
    assert jit.ctypes.CDLL(str(damaged)).answer() == 42


def test_what_does_not_load_does_not_stay(
    tmp_path: Path, compilers: Path, monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f'extern "C" int nobodys; {SOURCE.replace("42", "nobodys")}'
    compilers.write_text(COMPILER.replace("{source}", source))
    assert build.main(["--cpu", "--to", str(tmp_path / "kernels")]) == 1
    assert "undefined symbol: nobodys" in capsys.readouterr().err
    assert list((tmp_path / "kernels").iterdir()) == []


def test_by_default_where_a_server_looks(
    tmp_path: Path, compilers: Path, monkeypatch: MonkeyPatch
) -> None:
    assert build.main(["--cpu"]) == 0
    monkeypatch.setattr(jit, "cxx", lambda: pytest.fail("a compiler was looked for"))
    for unit in build.cpu():
        assert jit.load(unit.source, unit.language).answer() == 42


def test_instructions_that_the_compiler_does_not_know(
    compilers: Path, monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNKNOWN", "-mavx512bf16")
    assert build.main(["--cpu"]) == 0
    assert (
        "Not made: CPU, AMX; CPU, AVX-512 with BF16: nvcc failed: unrec" in capsys.readouterr().err
    )
    monkeypatch.setenv("UNKNOWN", "-mf16c")
    shutil.rmtree(os.environ[settings.CACHE])
    assert build.main(["--cpu"]) == 1
    said = capsys.readouterr().err
    names = "CPU, AMX; CPU, AVX-512 with BF16; CPU, AVX-512; CPU, AVX2; quantizing, AVX-512; "
    assert f"Not made: {names}quantizing, AVX2: nvcc failed" in said
    assert build.main(["--cuda"]) == 0


def test_without_nvcc(monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def nobody() -> Path:
        raise jit.KernelError("no nvcc: not here")

    monkeypatch.setattr(jit, "nvcc", nobody)
    assert build.main(["--cuda"]) == 1
    said = capsys.readouterr().err
    assert said.count("no nvcc: not here") == 1 and "HOPPER FP8 (vllm_nvfp4_moe), gated;" in said


def test_where_nothing_says_where(
    monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(settings.CACHE)
    monkeypatch.setenv("VLLM_CACHE_ROOT", "~nobody-of-this-name/cache")
    with pytest.raises(SystemExit):
        build.main(["--cpu"])
    assert "say one by --to" in capsys.readouterr().err


def test_a_folder_from_which_no_server_takes_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(SystemExit):
        build.main(["--to", str(folder)])
    assert f"{folder}: others can write there (mode 777)" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_a_server_without_a_compiler(
    tmp_path: Path, monkeypatch: MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The true kernels, made by root: another user, who can write nowhere, computes with them."""
    if not processor.AVX2.here:
        pytest.skip("the processor has no AVX2")
    folder = tmp_path / "kernels"
    monkeypatch.delenv("CXX", raising=False)
    assert build.main(["--cpu", "--to", str(folder)]) == 0
    # An old compiler may not know all instructions; but what it makes loads on any x86.
    assert "undefined symbol" not in capsys.readouterr().err
    code = (
        "import torch\n"
        "from vllm_nvfp4_moe.kernels.cpu.kernel import kernel_for\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    print(kernel_for(dtype).variant.instructions.name)\n"
        f"os.environ['{settings.CACHE}'] = '/proc/nowhere'\n"
        "kernel_for.__wrapped__(dtype)\n"
    )
    nowhere = ["PATH=/nowhere", "TMPDIR=/proc"]
    done = as_nobody(code, tmp_path, *nowhere, f"{settings.CACHE}={folder}")
    best = {
        dtype: next(
            v.instructions.name for v in cpu.VARIANTS if dtype in v.takes and v.instructions.here
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    assert done.stdout.splitlines()[-2:] == list(best.values()), done.stderr
    assert "KernelError: cannot be built or loaded: no folder can be written" in done.stderr


@pytest.mark.parametrize("place", ["beside", "elsewhere", "where others can write", "a library"])
def test_the_package_of_kernels(
    tmp_path: Path, log: Path, monkeypatch: MonkeyPatch, place: str
) -> None:
    """What lies beside this package is trusted as it is; anything else by its owner and mode."""
    folder = tmp_path / "site-packages" / jit.PACKAGE
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    library = folder / jit.file_name(SOURCE, jit.cuda("90a"))
    jit.build(SOURCE.replace("42", "43"), jit.cuda("90a"), library)
    monkeypatch.syspath_prepend(str(folder.parent))
    if place != "elsewhere":
        (library if place == "a library" else folder).chmod(0o775)
    if place == "beside":
        file = folder.parent / "vllm_nvfp4_moe" / "kernels" / "jit.py"
        monkeypatch.setattr(jit, "__file__", str(file))
    # It answers 43, so that one sees that it is the package's.
    trusted = place in ("beside", "elsewhere")
    assert jit.load(SOURCE, jit.cuda("90a")).answer() == (43 if trusted else 42)
    assert compilations(log) == (1 if trusted else 2)
    # A package of another version has no library of that name.
    assert jit.load(SOURCE + "\n", jit.cuda("90a")).answer() == 42
    damaged = folder / jit.file_name(f"{SOURCE}// damaged", jit.cuda("90a"))
    damaged.write_bytes(b"\x7fELF, and no more")
    assert jit.load(f"{SOURCE}// damaged", jit.cuda("90a")).answer() == 42


@pytest.mark.parametrize("which", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", ["at once", "compiling"])
def test_stopped(which: str, moment: str, tmp_path: Path) -> None:
    """One line, and no compiler goes on, nor what that has started; what was made stays."""
    script, numbers = tmp_path / "g++", tmp_path / "numbers"
    script.write_text(f"#!/bin/sh\nsleep 60 &\necho $! $$ >> {numbers}\nwait\n")
    script.chmod(0o755)
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "library.so").write_text("made before")
    command = [sys.executable, "-m", "vllm_nvfp4_moe.build", "--cpu", "--to", str(folder)]
    env = os.environ | {"CXX": str(script)}
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            if moment == "compiling":
                wait_until(numbers.exists)
                time.sleep(0.2)
            else:
                state = Path(f"/proc/{process.pid}/status")
                wait_until(lambda: catches(state.read_text(), getattr(signal, which)))
            process.send_signal(getattr(signal, which))
            said = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert said.splitlines()[-1].startswith("interrupted: ") and "Traceback" not in said
    started = numbers.read_text().split() if numbers.exists() else []
    assert bool(started) == (moment == "compiling")
    wait_until(lambda: not any(alive(int(number)) for number in started))
    assert [file.name for file in folder.iterdir()] == ["library.so"]


def catches(status: str, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal that is its own and not Python's for Ctrl-C."""
    caught = int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16)  # type: ignore[index]
    both = 1 << (signal.SIGTERM - 1) | 1 << (number - 1)
    return caught & both == both


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)
