"""The rules of the house that a machine can check."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def imports(file: Path) -> set[str]:
    """Top-level packages that ``file`` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_the_offline_side_never_needs_the_engine() -> None:
    files = list((ROOT / "quantize").rglob("*.py"))
    assert len(files) > 15
    guilty = {f.name for f in files if imports(f) & {"vllm", "vllm_nvfp4_moe", "tests", "examples"}}
    assert not guilty


@pytest.mark.parametrize(
    "command",
    [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports"]],
    ids=" ".join,
)
def test_clean(command: list[str]) -> None:
    tool = Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [str(tool), *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("quantize/nvfp4/format.py", "from quantize.run import plan"),  # up
        ("quantize/report/data.py", "from quantize.calibration import text"),  # to a neighbour
        ("quantize/layouts/__init__.py", "def lazy():\n    from quantize.cli import app"),
        ("quantize/run/plan.py", "import vllm_nvfp4_moe"),
        ("quantize/run/options.py", "from quantize.run import plan"),  # a circle of files
        ("quantize/new_room.py", ""),  # that no layer names
        ("vllm_nvfp4_moe/settings.py", "from vllm_nvfp4_moe import method"),
        ("vllm_nvfp4_moe/method.py", "if TYPE_CHECKING:\n    from vllm_nvfp4_moe import config"),
        ("vllm_nvfp4_moe/loading/checks.py", "from vllm_nvfp4_moe.loading import loaders"),
        ("quantize/errors.py", "if TYPE_CHECKING:\n    from quantize.run.plan import Plan"),
    ],
)
def test_an_arrow_that_runs_up_is_found(file: str, line: str, tmp_path: Path) -> None:
    for package in ("quantize", "vllm_nvfp4_moe"):
        shutil.copytree(ROOT / package, tmp_path / package)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as broken:
        broken.write(f"\nfrom typing import TYPE_CHECKING\n{line}\n")
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run(
        [str(tool), "--no-cache"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
