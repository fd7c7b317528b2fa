"""numba's cache on disk: used where there is a place for it, and never a reason not to run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.quantize.checkpoints import ONE_THREAD

MODULE = """
from quantize.nvfp4.kernels.compiled import compiled

@compiled(nogil=True)
def double(x):
    return 2 * x
"""
RUN = """
import sys
sys.path.insert(0, {folder!r})
from module import double
print(double(21), double._cache_hits)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A package of one module, which is not this one's: its cache is its own."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "module.py").write_text(MODULE)
    return tmp_path / "code"


def run(folder: Path, before: str = "", **environment: str | None) -> str:
    """The last line that RUN prints, run elsewhere."""
    env = {**ONE_THREAD, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    for name, value in environment.items():
        env.pop(name, None)
        if value is not None:
            env[name] = value
    done = subprocess.run(
        [sys.executable, "-c", before + RUN.format(folder=str(folder))],
        cwd=folder.parent, env=env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_it_is_kept(folder: Path) -> None:
    assert run(folder) == "42 Counter()"
    assert run(folder).startswith("42 Counter({(int64")


# What is left for numba where neither its folders nor the user's can be written, root or not.
NOWHERE = """
from numba.core.caching import CacheImpl
CacheImpl._locator_classes = []
"""
# As numba sees a folder that cannot be written.
READ_ONLY = """
import os
from numba.core import caching
access = os.access
os.access = lambda path, mode, **more: mode != os.W_OK and access(path, mode, **more)
ensure = caching._CacheLocator.ensure_cache_path
def fail(self):
    if "__pycache__" in self.get_cache_path():
        raise PermissionError(13, "Permission denied")
    ensure(self)
caching._CacheLocator.ensure_cache_path = fail
"""
NO_HOME = """
import os
if os.getuid() == 0:
    import numba, numpy, torch, quantize.nvfp4.kernels.compiled, fcntl, llvmlite.binding
    os.setgid(12345); os.setuid(12345)
os.environ.pop("HOME", None)
"""


def test_no_folder_at_all(folder: Path) -> None:
    assert run(folder, NOWHERE) == "42 Counter()"


def test_no_home_directory(folder: Path) -> None:
    """And the module's folder is read-only. Nothing is called ``~``."""
    import pwd

    before = READ_ONLY + "import pwd, os\nos.getuid = lambda: 12345\nos.environ.pop('HOME')\n"
    with pytest.raises(KeyError):
        pwd.getpwuid(12345)
    assert run(folder, before) == "42 Counter()"
    assert sorted(path.name for path in folder.parent.iterdir()) == ["code"]


def test_another_user(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    if os.getuid():
        pytest.skip("only root can become another user")
    folder.parent.parent.parent.chmod(0o755)
    folder.parent.parent.chmod(0o755)
    folder.parent.chmod(0o755)
    assert run(folder, NO_HOME) == "42 Counter()"
    assert sorted(path.name for path in folder.iterdir()) == ["module.py"]


def test_a_full_disk(folder: Path) -> None:
    full = """
from numba.core import caching
def save(self, *args):
    raise OSError(28, "No space left on device")
caching.IndexDataCacheFile.save = save
"""
    assert run(folder, full) == "42 Counter()"


def test_a_damaged_cache(folder: Path) -> None:
    run(folder)
    files = list(folder.rglob("*.nb?"))
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:60])
    assert run(folder) == "42 Counter()"
