"""Compiles this package's CUDA and C++ sources at first use, and keeps what comes out.

What is compiled lies in ``$NVFP4_MOE_CACHE``, by default ``nvfp4_moe`` in vLLM's cache, under a
hash of all that it depends on. If that folder cannot be used, one for this user alone below it or
in the system's folder for temporary files takes its place. What is loaded is code, so it is taken
only from folders that nobody but this user and root can write. Nothing is linked to PyTorch:
kernels take pointers, through ctypes. A library's symbols are hidden but for those that its source
marks as visible by default.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from quantize.native import environment

logger = logging.getLogger("vllm.nvfp4_moe.jit")
"""Below vLLM's logger, whose handlers it has in a server; elsewhere its warnings are seen."""


class KernelError(RuntimeError):
    """A kernel cannot be built or did not run; the message says why."""


@dataclass(frozen=True)
class Language:
    """What a source is written in, and for what it is compiled.

    Attributes:
        suffix: of its files.
        target: the processor.
        compiler: finds the compiler, or raises KernelError.
        options: what the compiler is told.
        linked: what it is told when it links, if it is not to do that at once.
    """

    suffix: str
    target: str
    compiler: Callable[[], Path]
    options: tuple[str, ...]
    linked: tuple[str, ...] = ()


def cuda(architecture: str) -> Language:
    """CUDA C++ for GPUs of an architecture, for example "90a"."""
    return Language(
        ".cu",
        f"sm_{architecture}",
        lambda: nvcc(),
        (
            "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden",
            "-gencode", f"arch=compute_{architecture},code=sm_{architecture}",
        ),
    )  # fmt: skip


def cpp(*options: str, openmp: bool = False) -> Language:
    """C++ for this host's processor.

    Args:
        options: the instruction sets that may be used, such as ``-mavx2``, and other options.
        openmp: whether the source has threads, which are OpenMP's.
    """
    threads = ("-fopenmp",) if openmp else ()
    # OpenMP's runtime is that of PyTorch, whose names are global: a second one would have threads
    # of its own, on cores that vLLM has given to others. With -fopenmp the linker asks for one.
    return Language(
        ".cpp",
        "this processor",
        lambda: cxx(),
        ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *threads, "-c", *options),
        ("-shared", "-nostdlib", "-lm", "-lc", "-lgcc"),
    )


def cxx() -> Path:
    """The path of the C++ compiler: ``$CXX``, or ``g++`` or ``c++`` on the path.

    Raises:
        KernelError: if there is none.
    """
    for name in (environment.cxx(), "g++", "c++"):
        if name and (found := shutil.which(name)):
            return Path(found)
    raise KernelError("no C++ compiler: neither $CXX, nor g++ or c++ on the path")


def nvcc() -> Path:
    """The path of CUDA's compiler: of ``$CUDA_HOME``, on the path, in ``/usr/local/cuda``, or of
    the packages that pip installs beside PyTorch.

    Raises:
        KernelError: if there is none.
    """
    home = environment.cuda_home()
    found = [Path(home, "bin", "nvcc")] if home else []
    if on_path := shutil.which("nvcc"):
        found.append(Path(on_path))
    found.append(Path("/usr/local/cuda/bin/nvcc"))
    packages = importlib.util.find_spec("nvidia")
    for folder in (packages and packages.submodule_search_locations) or ():
        found += sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)
    for path in found:
        if path.is_file():
            return path
    raise KernelError(
        "no nvcc: not in $CUDA_HOME, on the path, in /usr/local/cuda or in pip's packages"
    )


def folders() -> Iterator[Path]:
    """Where compiled kernels may be kept, the preferred place first. All exist and are safe, but
    one may be a place that this user can only read."""
    wanted = environment.cache()
    mine = f"user-{os.getuid()}"
    places = [] if wanted is None else [wanted, wanted / mine]
    with suppress(OSError):  # there may be none
        places.append(Path(tempfile.gettempdir(), f"nvfp4_moe-{mine}"))
    for place in places:
        try:
            # Nobody else may write in what is made here, whatever the umask is.
            place.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                place.mkdir(mode=0o700)
            problem = _unsafe(place)
        except OSError as error:
            problem = str(error)
        if problem is None:
            yield place
        elif place == wanted:
            logger.warning("Compiled kernels cannot be kept in %s: %s", place, problem)


def _unsafe(path: Path) -> str | None:
    """Why code is not loaded from ``path``; None if only this user and root can write there."""
    found = path.stat()
    if found.st_uid not in (0, os.getuid()):
        return f"it belongs to another user ({found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others can write there (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def build(source: str, language: Language, folder: Path) -> Path:
    """Compile, or find what was compiled before.

    Args:
        source: the whole text, without includes of ours.
        folder: one of :func:`folders`.

    Returns:
        The path of the shared library.

    Raises:
        KernelError: with what the compiler says.
        OSError: if it is not there, and cannot be written there.
    """
    compiler = language.compiler()
    version = _run(compiler, "--version")
    # The host's part of the library needs a processor and a C library like this host's.
    host = [platform.machine(), *platform.libc_ver()]
    key = "\0".join([version, *language.options, *language.linked, *host, source])
    library = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
    if not library.exists():
        with _locked(library.with_suffix(".lock")):
            if not library.exists():  # nobody compiled it meanwhile
                logger.info(
                    "Compiling a kernel for %s with %s, once: %s",
                    language.target,
                    compiler,
                    library,
                )
                _compile(compiler, language, source, library)
    if problem := _unsafe(library):
        raise OSError(f"{library}: {problem}")
    return library


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Within, no other process compiles the same: the ranks of a server start together."""
    with file.open("w") as handle:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _compile(compiler: Path, language: Language, source: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:
        file = Path(temporary, "kernel").with_suffix(language.suffix)
        made = file.with_suffix(".so")
        file.write_text(source)
        compiled = file.with_suffix(".o") if language.linked else made
        _run(compiler, "-o", compiled, file, *language.options)
        if language.linked:
            _run(compiler, "-o", made, compiled, *language.linked)
        made.chmod(0o755)
        made.replace(library)


def _run(compiler: Path, *arguments: str | Path) -> str:
    """What it prints."""
    done = subprocess.run([compiler, *arguments], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-2000:]
        said = said or f"it said nothing, and its exit status is {done.returncode}"
        raise KernelError(f"{compiler.name} failed: {said}")
    return done.stdout


def load(source: str, language: Language) -> ctypes.CDLL:
    """Load the library of :func:`build`, whose arguments it has but for the folder. A library that
    does not load, because it is damaged or from another host, is built again.

    Raises:
        KernelError: if it cannot be built, or cannot be loaded from any folder.
    """
    problems: dict[str, None] = {}
    for folder in folders():
        for _ in range(2):
            library = None
            try:
                library = build(source, language, folder)
                return ctypes.CDLL(str(library))
            except OSError as error:
                problems[str(error)] = None
                if library is None:
                    break
                with suppress(OSError):
                    library.unlink()
    raise KernelError(
        f"cannot be built or loaded: {'; '.join(problems) or 'no folder can be written'}"
    )
