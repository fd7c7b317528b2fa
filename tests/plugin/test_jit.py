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
from pathlib import Path

import pytest

from quantize.native import jit
from tests.conftest import ROOT
from vllm_nvfp4_moe import settings

SOURCE = 'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }'
NVCC = """#!/bin/sh
if [ "$1" = --version ]; then echo "a compiler, ${NVCC_SAYS:-13.0}"; exit; fi
echo compiled >> "$NVCC_LOG"
sleep "${NVCC_TAKES:-0}"
for word; do
    [ "$before" = -o ] && out=$word
    case "$word" in *.cu) file=$word;; esac
    before=$word
done
exec g++ -x c++ -shared -fPIC -fvisibility=hidden -o "$out" "$file"
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
        jit.load(source, jit.cpp("-mavx2"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX")
    with pytest.raises(jit.KernelError, match=r"no C\+\+ compiler: neither \$CXX"):
        jit.load(source, jit.cpp("-mavx2"))


@pytest.mark.parametrize("what", ["source", "architecture", "compiler", "processor", "C library"])
def test_what_the_library_depends_on(log: Path, monkeypatch: MonkeyPatch, what: str) -> None:
    jit.load(SOURCE, jit.cuda("90a"))
    source, architecture = SOURCE, "90a"
    if what == "source":
        source += "\n"
    elif what == "architecture":
        architecture = "100a"
    elif what == "compiler":
        monkeypatch.setenv("NVCC_SAYS", "13.1")
    elif what == "processor":
        monkeypatch.setattr("platform.machine", lambda: "aarch64")
    else:
        monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.99"))
    jit.load(source, jit.cuda(architecture))
    assert compilations(log) == 2


def test_a_library_that_does_not_load(tmp_path: Path, log: Path) -> None:
    """Damaged, or built with a newer C library on a host that shares the folder."""
    folder = next(iter(jit.folders()))
    library = jit.build(SOURCE, jit.cuda("90a"), folder)
    library.write_bytes(b"\x7fELF, and no more")
    assert jit.load(SOURCE, jit.cuda("90a")).answer() == 42
    assert compilations(log) == 2
    assert libraries(tmp_path) == [library]


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
    assert library.parent.stat().st_mode & 0o777 == 0o700
    assert f"cannot be kept in {cache}: others can write there (mode 777)" in caplog.text


@pytest.mark.parametrize("whole", [True, False], ids=["the folder", "the library"])
def test_what_another_user_has_put_there(
    tmp_path: Path, log: Path, monkeypatch: MonkeyPatch, whole: bool
) -> None:
    if os.getuid():
        pytest.skip("only root can give files away")
    library = jit.build(SOURCE.replace("42", "666"), jit.cuda("90a"), next(iter(jit.folders())))
    right = jit.build(SOURCE, jit.cuda("90a"), library.parent)
    library.replace(right)  # by the name that is looked for
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
    (tmp_path / "cache").chmod(0o755)
    done = as_nobody(LOAD, tmp_path, f"NVFP4_MOE_CACHE={tmp_path / 'cache'}")
    assert done.stdout.splitlines()[-1:] == ["42"], done.stderr
    assert compilations(log) == 1


def test_by_default_it_is_in_vllms_cache(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.delenv(settings.CACHE)
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "vllm"))
    assert next(iter(jit.folders())) == tmp_path / "vllm" / "nvfp4_moe"
