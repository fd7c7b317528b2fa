"""The wheel of compiled kernels: built, installed, and used where there is no compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from quantize.native import jit
from tests.conftest import ROOT
from tests.plugin.test_build import compilers
from tests.plugin.test_jit import log, tmp_path
from vllm_nvfp4_moe import settings

__all__ = ["compilers", "log", "tmp_path"]  # fixtures

ALL = """
import json
from vllm_nvfp4_moe import build
from quantize.native import jit
units = [*build.cuda(), *build.cpu()]
print(json.dumps([jit.load(unit.source, unit.language).answer() for unit in units]))
"""


def test_a_wheel_of_kernels(tmp_path: Path, compilers: Path) -> None:
    project = tmp_path / "project"
    shutil.copytree(ROOT / "jit_cache", project, ignore=shutil.ignore_patterns("*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, project]
    subprocess.run([*pip, *build], check=True, env=env)
    (wheel,) = tmp_path.glob("*.whl")
    name, version, *tag = wheel.stem.split("-")
    assert name == jit.PACKAGE and tag[:2] == ["py3", "none"]
    assert tag[2].startswith("manylinux_2_")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [n for n in archive.namelist() if n.endswith("/METADATA")]
        assert f"\nRequires-Dist: vllm-nvfp4-moe=={version}\n" in archive.read(metadata).decode()
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    nowhere = {"PATH": "/nowhere", "CUDA_HOME": "/nowhere", "CXX": "", "TMPDIR": "/proc"}
    env |= {"PYTHONPATH": f"{ROOT}:{site}", settings.CACHE: "/proc/nowhere", **nowhere}
    done = subprocess.run([sys.executable, "-c", ALL], env=env, capture_output=True, text=True)
    assert json.loads(done.stdout) == [42] * 15, done.stderr
