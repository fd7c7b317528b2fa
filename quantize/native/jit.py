"""Loads this package's CUDA and C++ sources as libraries, and compiles what is not there yet.

A library's name is a hash of its source, of what the compiler is told and of the processor. It says
nothing of the compiler, which is looked for only if no folder has a library of that name that loads
here: so an image or a package can bring them all (``python -m vllm_nvfp4_moe.build``). They lie in
``$NVFP4_MOE_CACHE``, by default ``nvfp4_moe`` in vLLM's cache. If that folder cannot be used, one
for this user alone below it or in the system's folder for temporary files takes its place. What is
loaded is code, so it is taken only from folders that nobody but this user and root can write.

Nothing is linked to PyTorch: kernels take pointers, through ctypes. A library's symbols are hidden
but for those that its source marks as visible by default.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import TypeVar

from quantize.native import environment

logger = logging.getLogger("vllm.nvfp4_moe.jit")
"""Below vLLM's logger, whose handlers it has in a server; elsewhere its warnings are seen."""


PACKAGE = "vllm_nvfp4_moe_jit_cache"
"""What the optional distribution ``vllm-nvfp4-moe-jit-cache`` installs (jit_cache)."""

NOTE = ".does-not-load"
"""Suffix of a file beside a library that loads from no folder. It says what had compiled it."""


class KernelError(RuntimeError):
    """A kernel cannot be built or did not run; the message says why."""


@dataclass(frozen=True)
class Language:
    """What a source is written in, and for what it is compiled.

    Attributes:
        suffix: of its files.
        target: the processor.
        compiler: finds the compiler, or raises KernelError: its path, and words that come before
            all others.
        options: what the compiler is told.
        linked: what it is told when it links, if it is not to do that at once.
        libraries: a folder beside the compiler's, in which it may not look for libraries itself.
    """

    suffix: str
    target: str
    compiler: Callable[[], tuple[str, ...]]
    options: tuple[str, ...]
    linked: tuple[str, ...] = ()
    libraries: str | None = None


def cuda(architecture: str) -> Language:
    """CUDA C++ for GPUs of an architecture, for example "90a"."""
    return Language(
        ".cu",
        f"sm_{architecture}",
        lambda: (str(nvcc()),),
        (
            "-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden",
            "-gencode", f"arch=compute_{architecture},code=sm_{architecture}",
        ),
        libraries="lib",  # of pip's packages; nvcc looks in lib64
    )  # fmt: skip


def cpp(*options: str, openmp: bool = False) -> Language:
    """C++ for this host's processor.

    Args:
        options: the instruction sets that may be used, such as ``-mavx2``, and other options.
        openmp: whether the source has threads, which are OpenMP's.
    """
    threads = ("-fopenmp",) if openmp else ()
    # OpenMP's runtime is that of PyTorch, whose names are global: a second one would have threads
    # of its own, on cores that vLLM has given to others. With -fopenmp the linker asks for one. Nor
    # is there a runtime of C++, which a destructor would want where there are exceptions.
    return Language(
        ".cpp",
        "this processor",
        lambda: cxx(),
        (
            "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", *threads, "-c",
            *options,
        ),
        ("-shared", "-nostdlib", "-lm", "-lc", "-lgcc"),
    )  # fmt: skip


def cxx() -> tuple[str, ...]:
    """The path of the C++ compiler, ``$CXX``, or ``g++`` or ``c++`` on the path; and the words that
    follow it in ``$CXX``, as in ``ccache g++``.

    Raises:
        KernelError: if there is none.
    """
    asked = environment.cxx() or ""
    try:
        # A path may have spaces, too.
        words = [asked] if shutil.which(asked) else shlex.split(asked)
    except ValueError as error:
        raise KernelError(f"CXX={asked}: {error}") from error
    for name, *more in (words, ["g++"], ["c++"]) if words else (["g++"], ["c++"]):
        if found := shutil.which(name):
            if words and name != words[0]:
                _say_what_compiles(asked, found)
            return found, *more
    raise KernelError("no C++ compiler: neither $CXX, nor g++ or c++ on the path")


@cache
def _say_what_compiles(asked: str, found: str) -> None:
    """Once, though the compiler is looked for by each kernel."""
    logger.warning("CXX=%s: there is no such program. %s compiles", asked, found)


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


def folders(make: bool = True) -> Iterator[Path]:
    """Where compiled kernels may be kept, the preferred place first. All exist and are safe, but
    one may be a place that this user can only read.

    Args:
        make: whether a folder that is not there is made, or passed over.
    """
    wanted = environment.cache()
    mine = f"user-{os.getuid()}"
    places = [] if wanted is None else [wanted, wanted / mine]
    with suppress(OSError):  # there may be none
        places.append(Path(tempfile.gettempdir(), f"nvfp4_moe-{mine}"))
    for place in places:
        try:
            if make:
                make_folder(place)
            elif not place.exists():
                continue
            check_safe(place)
        except OSError as error:
            if place == wanted and make:
                logger.warning("Compiled kernels cannot be kept where they should be: %s", error)
        else:
            yield place


def make_folder(place: Path) -> None:
    """Make ``place`` unless it is there. Whatever the umask is, others can read what is made, and
    nobody else can write in it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        place.mkdir(mode=0o700)
        place.chmod(0o755)


def check_safe(path: Path) -> None:
    """Raise an OSError if anybody but this user and root can write in ``path``: no code is loaded
    from there."""
    found = path.stat()
    if found.st_uid not in (0, os.getuid()):
        raise OSError(f"{path}: it belongs to another user ({found.st_uid})")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"{path}: others can write there (mode {stat.S_IMODE(found.st_mode):o})")


def packaged(name: str) -> Path | None:
    """The library of that name in the package ``vllm-nvfp4-moe-jit-cache``, which may not have it.
    None if there is no package, or none that can be trusted."""
    package = importlib.util.find_spec(PACKAGE)
    for folder in map(Path, (package and package.submodule_search_locations) or ()):
        library = folder / name
        try:
            # Whoever can write beside this package can change this module as well.
            if folder.parent != Path(__file__).parents[2]:
                for path in (folder, library) if library.exists() else (folder,):
                    check_safe(path)
        except OSError as error:
            logger.warning("The package of compiled kernels is not used: %s", error)
        else:
            return library
    return None


def file_name(source: str, language: Language) -> str:
    """Of the library, without a folder."""
    # The host's part needs a processor like this host's, and its C library or a newer one: where
    # that is not so, the library does not load.
    host = [platform.machine(), platform.libc_ver()[0]]
    key = "\0".join([*language.options, *language.linked, *host, source])
    return f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"


def build(source: str, language: Language, library: Path) -> None:
    """Compile, into a file that others can read. It is there whole or not at all.

    Args:
        source: the whole text, without includes of ours.
        library: what is to be made, in a folder that is there.

    Raises:
        KernelError: with what the compiler says.
        OSError: if it cannot be written.
    """
    compiler = language.compiler()
    with_ = shlex.join(compiler)
    logger.info("Compiling a kernel for %s with %s, once: %s", language.target, with_, library)
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:
        file = Path(temporary, "kernel").with_suffix(language.suffix)
        made = file.with_suffix(".so")
        file.write_text(source)
        compiled = file.with_suffix(".o") if language.linked else made
        more = []
        if language.libraries:
            more = [f"-L{Path(compiler[0]).parents[1] / language.libraries}"]
        _run(compiler, "-o", compiled, file, *language.options, *more)
        if language.linked:
            _run(compiler, "-o", made, compiled, *language.linked)
        made.chmod(0o755)
        made.replace(library)


_running: set[int] = set()
"""Compilers that are at work: each is the first of a group of processes."""


def end_compilers() -> None:
    """Kill all that are at work for this process, with the parts that they consist of."""
    for group in list(_running):
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def _run(compiler: tuple[str, ...], *arguments: str | Path) -> None:
    with subprocess.Popen(
        [*compiler, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        _running.add(process.pid)
        try:
            out, err = process.communicate()
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            _running.discard(process.pid)
    if process.returncode:
        said = (err or out).strip()[-2000:]
        said = said or f"it said nothing, and its exit status is {process.returncode}"
        raise KernelError(f"{shlex.join([Path(compiler[0]).name, *compiler[1:]])} failed: {said}")


def load(source: str, language: Language) -> ctypes.CDLL:
    """Load the library of ``source``, whose arguments :func:`build` has. If none loads, because
    there is none, or it is damaged or from another host, it is compiled, once.

    Raises:
        KernelError: if it cannot be built, or cannot be loaded from any folder.
    """
    name = file_name(source, language)
    problems: dict[str, None] = {}
    if prebuilt := packaged(name):
        try:
            return ctypes.CDLL(str(prebuilt))
        except OSError as error:
            problems[str(error)] = None
            logger.warning(
                "The installed package of kernels has none for %s that loads here and is of this "
                "version, and it is looked for elsewhere: %s", language.target, error,
            )  # fmt: skip
    found = _loaded(name, folders(make=False), problems)
    for folder in () if found else folders():
        try:
            with _locked(folder / name):
                # Another process may have compiled it meanwhile.
                found = _loaded(name, folders(make=False), problems) or _made(
                    source, language, folder / name, problems
                )
            break
        except OSError as error:  # this user can only read there
            problems[str(error)] = None
    if found is None:
        raise KernelError(
            f"cannot be built or loaded: {'; '.join(problems) or 'no folder can be written'}"
        )
    return found


Kind = TypeVar("Kind")
Made = TypeVar("Made")


def first_made(kinds: Iterable[Kind], make: Callable[[Kind], Made]) -> Made | None:
    """What ``make`` makes of the first of ``kinds`` that it can be made of: an old compiler does
    not know the newest instructions. None if there are no kinds.

    Raises:
        KernelError: the last one's, if it can be made of none.
    """
    problem = None
    for kind in kinds:
        try:
            return make(kind)
        except KernelError as error:
            problem = error
    if problem is not None:
        raise problem
    return None


def _loaded(name: str, places: Iterable[Path], problems: dict[str, None]) -> ctypes.CDLL | None:
    """The library from the first of the places that has one that loads; why others do not is noted
    in ``problems``."""
    for library in (place / name for place in places):
        try:
            if library.exists():
                check_safe(library)
                return ctypes.CDLL(str(library))
        except OSError as error:
            problems[str(error)] = None
    return None


def _made(
    source: str, language: Language, library: Path, problems: dict[str, None]
) -> ctypes.CDLL | None:
    """Compile ``library``, and load it, or else a copy of it in one of the other folders.

    If it loads from none, it stays, beside a note that it does not: no later start compiles it
    again with the same compiler to learn the same.
    """
    program, *words = language.compiler()
    note, compiler = library.with_suffix(NOTE), shlex.join([str(Path(program).resolve()), *words])
    if library.exists() and note.exists() and note.read_text() == compiler:
        raise KernelError(
            f"it was compiled before, and does not load: {'; '.join(problems)}. Remove {note} to "
            "have it compiled again"
        )
    build(source, language, library)
    for place in chain([library.parent], folders()):
        copy = place / library.name
        if copy != library:
            with suppress(OSError):
                temporary = copy.with_suffix(f".{os.getpid()}")
                shutil.copy(library, temporary)
                temporary.replace(copy)
        if found := _loaded(copy.name, [place], problems):
            note.unlink(missing_ok=True)
            return found
    note.write_text(compiler)
    return None


@contextmanager
def _locked(library: Path) -> Iterator[None]:
    """Within, no other process compiles the same: the ranks of a server start together."""
    with library.with_suffix(".lock").open("w") as handle:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
