"""``pip install`` of a source distribution and its wheel; a user works in a folder of theirs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.quantize import checkpoints

PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def ours() -> set[str]:
    """All files of the packages, code or not."""
    words = ["git", "ls-files", "quantize", "vllm_nvfp4_moe"]
    return set(subprocess.check_output(words, cwd=ROOT, text=True).split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, which is built from a clone."""
    folder = tmp_path_factory.mktemp("built")
    clone = folder / "clone"
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).split()
    for name in (n for n in tracked if not n.startswith(("docs/", "benchmarks/"))):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    done = subprocess.run(
        [sys.executable, "-c", SDIST, str(folder)], cwd=clone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert {name.partition("/")[2] for name in archive.getnames()} >= ours()
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sdist]
    subprocess.run([*PIP, *build], check=True)
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_has_all_files_and_no_others(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if ".dist-info/" not in n}
    assert names == ours()


def test_a_user_works_in_a_folder_of_theirs(wheel: Path, tmp_path: Path) -> None:
    """Which has a ``quantize.py``, and comes first in ``PYTHONPATH``."""
    site, folder = tmp_path / "site", tmp_path / "mine"
    subprocess.run([*PIP, "install", "--no-deps", "--target", site, wheel], check=True)
    checkpoints.build("qwen3_moe").save_pretrained(tmp_path / "source")
    folder.mkdir()
    (folder / "quantize.py").write_text("raise SystemExit('the user runs it')\n")
    env = os.environ | {"PYTHONPATH": f"{folder}:{site}"}

    def command(*words: object) -> str:
        script = [sys.executable, site / "bin" / "nvfp4-moe", *map(str, words)]
        done = subprocess.run(script, cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    where = "import vllm_nvfp4_moe.drafts, quantize; print(quantize.__file__)"
    words = [sys.executable, "-c", where]
    said = subprocess.check_output(words, cwd=folder, env=env, text=True, stderr=subprocess.PIPE)
    assert Path(said.strip()) == site / "quantize" / "__init__.py"
    command("quantize", tmp_path / "source", folder / "made")
    command("verify", tmp_path / "source", folder / "made")
    assert (folder / "made" / "nvfp4_moe_report.html").exists()
