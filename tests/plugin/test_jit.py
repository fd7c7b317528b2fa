"""Where compiled kernels are kept, who may have written them, and who compiles.

``nvcc`` is a script here that hands C++ to the host's compiler and notes each time it is called, so
that none of this needs CUDA.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from vllm import envs

from quantize.native import environment, jit
from tests.conftest import ROOT
from vllm_nvfp4_moe import settings

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }'
NVCC = """#!/bin/sh
echo compiled >> "$NVCC_LOG"
sleep "${NVCC_TAKES:-0}"
for word; do
    [ "$before" = -o ] && out=$word
    case "$word" in *.cu) file=$word;; esac
    before=$word
done
exec g++ -x c++ -shared -fPIC -fvisibility=hidden -o "$out" "$file" $NVCC_MORE
"""
LOAD = f"print(jit.load({SOURCE!r}, jit.cuda('90a')).answer())"
MonkeyPatch = pytest.MonkeyPatch


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder that other users can enter, too; pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(autouse=True)
def log(tmp_path: Path, monkeypatch: MonkeyPatch) -> Path:
    """Its lines are the compilations."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(NVCC)
    compiler.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("NVCC_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv(settings.CACHE, str(tmp_path / "cache"))
    return tmp_path / "log"


def compilations(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def built(source: str = SOURCE) -> Path:
    """A library in the folder that is preferred."""
    folder = next(iter(jit.folders()))
    library = folder / jit.file_name(source, jit.cuda("90a"))
    jit.build(source, jit.cuda("90a"), library)
    return library


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.so"))


def test_a_library_is_built_once(tmp_path: Path, log: Path, monkeypatch: MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(jit.logger, "info", lambda text, *args: said.append(text % args))
    assert jit.load(SOURCE, jit.cuda("90a")).answer() == 42
    assert jit.load(SOURCE, jit.cuda("90a")).answer() == 42
    assert compilations(log) == 1
    (library,) = libraries(tmp_path)
    assert library.parent == tmp_path / "cache"
    (line,) = said
    assert line.startswith("Compiling a kernel for sm_90a with ") and line.endswith(str(library))
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".so", ".lock"}


def test_what_does_not_compile(tmp_path: Path) -> None:
    with pytest.raises(jit.KernelError, match="no_such_type"):
        jit.load("no_such_type x;", jit.cuda("90a"))
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock"}


def test_without_a_compiler(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    with pytest.raises(jit.KernelError, match="no nvcc"):
        jit.load("", jit.cuda("90a"))


def test_cpp(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """For this host: by ``$CXX``, and with the names of PyTorch's OpenMP."""
    noted = tmp_path / "cxx.log"
    compiler = tmp_path / "my-c++"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {noted}\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    source = SOURCE.replace(
        "return 42;",
        "int n = 0;\n#pragma omp parallel for reduction(+ : n)\n"
        "for (int i = 0; i < 42; i++) n += __AVX2__;\nreturn n;",
    )
    assert jit.load(source, jit.cpp("-mavx2")).answer() == 42
    assert "-mavx2" in noted.read_text()
    (library,) = libraries(tmp_path)
    needed = subprocess.run(["ldd", library], capture_output=True, text=True, check=True).stdout
    assert "omp" not in needed
    with pytest.raises(jit.KernelError, match=r"my-c\+\+ failed: .*no_such_type"):
        jit.load("no_such_type x;", jit.cpp())
    compiler.write_text("#!/bin/sh\necho no licence >&2; exit 3\n")
    with pytest.raises(jit.KernelError, match=r"my-c\+\+ failed: no licence"):
        jit.load(source, jit.cpp("-mavx"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX")
    with pytest.raises(jit.KernelError, match=r"no C\+\+ compiler: neither \$CXX"):
        jit.load(source, jit.cpp("-mavx"))


def test_cxx_in_several_words(log: Path, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """As ``ccache g++``; and a program that there is not."""
    noted = tmp_path / "cxx.log"
    program = tmp_path / "a cache"
    program.write_text(f'#!/bin/sh\necho "$@" >> {noted}\nexec "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{program}' g++ -DANSWER=42")
    source = SOURCE.replace("return 42;", "return ANSWER;")
    assert jit.load(source, jit.cpp()).answer() == 42
    assert [line.split()[:2] for line in noted.read_text().splitlines()] == [
        ["g++", "-DANSWER=42"]
    ] * 2
    monkeypatch.setenv("CXX", f"'{program}' g++ -DANSWER=no_such_name")
    with pytest.raises(
        jit.KernelError, match=r"(?s)'a cache' g\+\+ -DANSWER=\S+ failed: .*no_such_name"
    ):
        jit.load(source, jit.cpp("-mavx"))
    monkeypatch.setenv("CXX", f"'{program} g++")
    with pytest.raises(jit.KernelError, match=r"^CXX='.*: No closing quotation"):
        jit.load(source, jit.cpp("-mavx"))
    said: list[str] = []
    monkeypatch.setattr(jit.logger, "warning", lambda text, *args: said.append(text % args))
    monkeypatch.setenv("CXX", "no-such-program g++")
    for _ in range(2):  # as of two kernels
        (found,) = jit.cxx()
    assert found == shutil.which("g++")
    assert said == [f"CXX=no-such-program g++: there is no such program. {found} compiles"]


@pytest.mark.parametrize("asked", ["{folder}/my tools/compiler", "./compiler"])
def test_cxx_is_a_path(log: Path, tmp_path: Path, monkeypatch: MonkeyPatch, asked: str) -> None:
    """One with a space in it, and one without a folder above it."""
    folder = tmp_path / "my tools"
    folder.mkdir()
    (folder / "compiler").symlink_to(str(shutil.which("g++")))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CXX", asked.format(folder=tmp_path))
    assert jit.cxx() == (asked.format(folder=tmp_path),)
    assert jit.load(SOURCE, jit.cpp()).answer() == 42


@pytest.mark.parametrize("what", ["source", "architecture", "options", "processor", "C library"])
def test_what_the_library_depends_on(log: Path, monkeypatch: MonkeyPatch, what: str) -> None:
    jit.load(SOURCE, jit.cuda("90a"))
    source, language = SOURCE, jit.cuda("90a")
    if what == "source":
        source += "\n"
    elif what == "architecture":
        language = jit.cuda("100a")
    elif what == "options":
        language = replace(language, options=(*language.options, "--use_fast_math"))
    elif what == "processor":
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
    else:
        monkeypatch.setattr("platform.libc_ver", lambda: ("musl", "1.2"))
    jit.load(source, language)
    assert compilations(log) == 2


def test_a_library_that_does_not_load(tmp_path: Path, log: Path) -> None:
    """Damaged, or built with a newer C library on a host that shares the folder."""
    library = built()
    library.write_bytes(b"\x7fELF, and no more")
    assert jit.load(SOURCE, jit.cuda("90a")).answer() == 42
    assert compilations(log) == 2
    assert libraries(tmp_path) == [library]


def test_one_that_loads_nowhere_is_compiled_once(
    tmp_path: Path, log: Path, monkeypatch: MonkeyPatch
) -> None:
    """Not again at each start: it would not load then either."""
    monkeypatch.setenv("NVCC_MORE", "-Wl,--no-as-needed -Wl,-z,now")
    missing = 'extern "C" int nobody_has_this(); ' + SOURCE.replace("42", "nobody_has_this()")
    for _ in range(3):
        with pytest.raises(jit.KernelError, match="undefined symbol: nobody_has_this"):
            jit.load(missing, jit.cuda("90a"))
    assert compilations(log) == 1
    with pytest.raises(jit.KernelError, match=r"was compiled before, .*\. Remove "):
        jit.load(missing, jit.cuda("90a"))
    (note,) = (tmp_path / "cache").glob("*.does-not-load")
    note.unlink()
    with pytest.raises(jit.KernelError, match="undefined symbol: nobody_has_this"):
        jit.load(missing, jit.cuda("90a"))
    assert compilations(log) == 2
    # It is tried before the note is looked at: the host may have got what was missing.
    library = note.with_suffix(".so")
    shutil.copy(built(), library)
    assert jit.load(missing, jit.cuda("90a")).answer() == 42


def test_another_compiler_may_make_one_that_loads(
    tmp_path: Path, log: Path, monkeypatch: MonkeyPatch
) -> None:
    """As g++ after clang, whose OpenMP is not PyTorch's."""
    monkeypatch.setenv("NVCC_MORE", "-Wl,--unresolved-symbols=ignore-all -Dmissing=nobody_has_this")
    source = 'extern "C" int missing(); ' + SOURCE.replace("42", "missing()")
    source = f"#ifndef missing\n{SOURCE}\n#else\n{source}\n#endif\n"
    with pytest.raises(jit.KernelError, match="undefined symbol: nobody_has_this"):
        jit.load(source, jit.cuda("90a"))
    monkeypatch.delenv("NVCC_MORE")
    shutil.copytree(tmp_path / "cuda", tmp_path / "another")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "another"))
    assert jit.load(source, jit.cuda("90a")).answer() == 42
    assert compilations(log) == 2
    assert not list(tmp_path.rglob("*.does-not-load"))


def test_a_folder_from_which_nothing_runs(
    tmp_path: Path, log: Path, monkeypatch: MonkeyPatch
) -> None:
    """Mounted with ``noexec``: what is compiled there is copied to the next, and found there."""
    mapped = jit.ctypes.CDLL

    def no_exec(file: str) -> object:
        if "/cache/" in file:
            raise OSError(f"{file}: failed to map segment from shared object")
        return mapped(file)

    monkeypatch.setattr(jit.ctypes, "CDLL", no_exec)
    (tmp_path / "cache" / f"user-{os.getuid()}").mkdir(parents=True, mode=0o700)
    for _ in range(2):
        assert jit.load(SOURCE, jit.cuda("90a")).answer() == 42
    assert compilations(log) == 1
    assert (tmp_path / "temporary" / f"nvfp4_moe-user-{os.getuid()}") in [
        library.parent for library in libraries(tmp_path)
    ]
    assert not list(tmp_path.rglob("*.does-not-load"))


def test_what_is_there_needs_no_compiler(
    tmp_path: Path, log: Path, monkeypatch: MonkeyPatch
) -> None:
    built()
    monkeypatch.setattr(jit, "nvcc", lambda: pytest.fail("a compiler was looked for"))
    assert jit.load(SOURCE, jit.cuda("90a")).answer() == 42


def test_pips_compiler_finds_its_libraries(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """They lie in ``lib``, and nvcc looks in ``lib64``."""
    folder = tmp_path / "cuda" / "lib"
    folder.mkdir()
    part = tmp_path / "part.cpp"
    part.write_text('extern "C" int nobody_has_this() { return 43; }')
    subprocess.run(["g++", "-shared", "-fPIC", part, "-o", folder / "libpart.so"], check=True)
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    linking = ' "$(for w; do case "$w" in -L*) echo $w;; esac; done)" -lpart'
    compiler.write_text(NVCC.replace(" $NVCC_MORE", f' {linking} "-Wl,-rpath,{folder}"'))
    source = 'extern "C" int nobody_has_this(); ' + SOURCE.replace("42", "nobody_has_this()")
    assert jit.load(source, jit.cuda("90a")).answer() == 43


def test_the_ranks_of_a_server_compile_once(log: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC_TAKES", "2")
    rank = f"from quantize.native import jit; {LOAD}"
    ranks = [
        subprocess.Popen([sys.executable, "-c", rank], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [process.communicate()[0] for process in ranks] == ["42\n"] * 4
    assert compilations(log) == 1


def test_folders_that_others_can_write(
    tmp_path: Path, log: Path, monkeypatch: MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a volume that Kubernetes makes: a folder of one's own below it is safe."""
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(0o777)
    logging.getLogger("vllm").propagate = True
    assert jit.load(SOURCE, jit.cuda("90a")).answer() == 42
    (library,) = libraries(tmp_path)
    assert library.parent == cache / f"user-{os.getuid()}"
    assert library.parent.stat().st_mode & 0o777 == 0o755
    assert (
        f"cannot be kept where they should be: {cache}: others can write there (mode 777)"
        in caplog.text
    )


@pytest.mark.parametrize("whole", [True, False], ids=["the folder", "the library"])
def test_what_another_user_has_put_there(
    tmp_path: Path, log: Path, monkeypatch: MonkeyPatch, whole: bool
) -> None:
    if os.getuid():
        pytest.skip("only root can give files away")
    right = built()
    built(SOURCE.replace("42", "666")).replace(right)  # by the name that is looked for
    os.chown(right.parent if whole else right, 12345, -1)
    assert jit.load(SOURCE, jit.cuda("90a")).answer() == 42
    assert compilations(log) == 3


ELSEWHERE = """
import os, sys
sys.path.insert(0, sys.argv[2])
import vllm.envs
from quantize.native import jit
user = int(sys.argv[1])
os.setgroups([]); os.setgid(user); os.setuid(user)
for name in ("HOME", "XDG_CACHE_HOME", "VLLM_CACHE_ROOT", "NVFP4_MOE_CACHE"):
    os.environ.pop(name, None)
for setting in sys.argv[3:]:
    name, value = setting.split("=", 1)
    os.environ[name] = value
"""


def as_nobody(code: str, folder: Path, *environment: str) -> subprocess.CompletedProcess[str]:
    """Run as a user without an entry in passwd, who has no home directory, in ``folder``."""
    if os.getuid():
        pytest.skip("only root can become another user")
    return subprocess.run(
        [sys.executable, "-c", ELSEWHERE + code, "12345", str(ROOT), *environment],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    "cache", [None, "VLLM_CACHE_ROOT=/proc/nowhere", "NVFP4_MOE_CACHE=/proc/x"]
)
def test_a_user_without_a_home(tmp_path: Path, log: Path, cache: str | None) -> None:
    """And with a folder that cannot be written."""
    log.touch()
    log.chmod(0o666)
    (tmp_path / "temporary").chmod(0o777)
    settings_ = [] if cache is None else [cache]
    done = as_nobody(LOAD, tmp_path, *settings_)
    assert done.stdout.splitlines()[-1:] == ["42"], done.stderr
    (library,) = libraries(tmp_path)
    assert library.parent == tmp_path / "temporary" / "nvfp4_moe-user-12345"


def test_a_library_that_root_has_built(tmp_path: Path, log: Path) -> None:
    """As in an image: others can read it, and nobody needs to write."""
    jit.load(SOURCE, jit.cuda("90a"))
    shutil.rmtree(tmp_path / "cuda")
    done = as_nobody(LOAD, tmp_path, f"NVFP4_MOE_CACHE={tmp_path / 'cache'}")
    assert done.stdout.splitlines()[-1:] == ["42"], done.stderr
    assert compilations(log) == 1


@pytest.mark.parametrize("variable", ["VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "HOME"])
def test_by_default_it_is_in_vllms_cache(
    variable: str, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    """As vLLM itself says where that is."""
    monkeypatch.delenv(settings.CACHE)
    for name in ("VLLM_CACHE_ROOT", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "a"))
    assert environment.cache() == Path(envs.VLLM_CACHE_ROOT) / "nvfp4_moe"
