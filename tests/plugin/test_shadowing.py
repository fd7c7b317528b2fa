"""A user's own ``quantize``: a file or a folder beside their script, or where they start Python."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from vllm_nvfp4_moe import shadowing

PACKAGE = ROOT / "vllm_nvfp4_moe"


@pytest.fixture(params=["quantize.py", "quantize/__init__.py"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return with_their(tmp_path, request.param)


def with_their(folder: Path, name: str) -> Path:
    """A module of the user's."""
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("print('the user runs it')\n")
    return file


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run in ``folder``, which comes first in ``sys.path`` for ``-c`` and ``-m``."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip


def test_ours_is_imported(file: Path, tmp_path: Path) -> None:
    """Once anything of the plugin needs it."""
    code = "import vllm_nvfp4_moe.drafts, quantize; print(quantize.__file__)"
    done = python(tmp_path, "-c", code)
    assert done.stdout.splitlines() == [str(ROOT / "quantize" / "__init__.py")], done.stderr
    assert done.stderr.startswith(f"{file} cannot be imported from here on: 'quantize' is the")


def test_their_own_is_theirs_until_then(file: Path, tmp_path: Path) -> None:
    """And for good in a program that serves other models."""
    code = "import vllm_nvfp4_moe; vllm_nvfp4_moe.register(); import quantize"
    done = python(tmp_path, "-c", code)
    assert (done.stdout, done.stderr) == ("the user runs it\n", "")


def test_a_program_that_has_imported_its_own(file: Path, tmp_path: Path) -> None:
    done = python(tmp_path, "-c", "import quantize, vllm_nvfp4_moe.drafts")
    assert done.stderr.splitlines()[-1] == (
        f"ImportError: {file} is in the way: this program has imported it as 'quantize', which is "
        "the name of a package of vllm-nvfp4-moe. Rename it"
    )


def test_a_folder_that_is_no_package(tmp_path: Path) -> None:
    """Python itself passes over it; and once there is ours in the process, it is ours."""
    with_their(tmp_path, "quantize/notes.py")
    for first in ("quantize", "vllm_nvfp4_moe.drafts"):
        code = f"import {first}, vllm_nvfp4_moe.drafts, quantize; print(quantize.__file__)"
        done = python(tmp_path, "-c", code)
        assert done.stdout.splitlines() == [str(ROOT / "quantize" / "__init__.py")], done.stderr
        assert done.stderr == ""


def test_commands(file: Path, tmp_path: Path) -> None:
    """The console script, with a folder in its path as ``PYTHONPATH`` can have it; and build."""
    script = "import sys; from vllm_nvfp4_moe.command import main; sys.argv[1:] = ['--version']"
    done = python(tmp_path, "-c", f"{script}; main()")
    assert done.returncode == 0 and "the user" not in done.stdout, done.stderr
    done = python(tmp_path, "-m", "vllm_nvfp4_moe.build", "--help")
    assert done.returncode == 0 and "--cuda" in done.stdout, done.stderr


def test_python_m_quantize(tmp_path: Path) -> None:
    """Runs what Python finds first; ``-P`` leaves the folder out, as the docs say."""
    with_their(tmp_path, "quantize.py")
    assert "the user runs it" in python(tmp_path, "-m", "quantize", "--version").stdout
    done = python(tmp_path, "-P", "-m", "quantize", "--version")
    assert done.returncode == 0 and "the user" not in done.stdout, done.stderr


VLLM = """
import sys
from vllm.engine.arg_utils import EngineArgs
ours, other = sys.argv[1:]
EngineArgs(model=other, enforce_eager=True).create_model_config()
import quantize
try:
    EngineArgs(model=ours, quantization="nvfp4_moe").create_engine_config()
except ImportError as error:
    print(error)
"""
ALONE = """
import sys
from vllm.engine.arg_utils import EngineArgs
config = EngineArgs(model=sys.argv[1], max_model_len=64).create_engine_config()
print(config.quant_config.gates)
"""


def test_through_vllm(tmp_path: Path, shallow: dict[str, Path], shallow_bf16: Path) -> None:
    file = with_their(tmp_path, "quantize.py")
    models = [str(shallow["modelopt"]), str(shallow_bf16)]
    done = python(tmp_path, "-c", ALONE, models[0])
    gate = "swiglu_oai(alpha=1.702, beta=1, limit=7)"
    assert done.stdout.splitlines()[-1:] == [gate], done.stderr
    assert f"{file} cannot be imported from here on" in done.stdout + done.stderr
    done = python(tmp_path, "-c", VLLM, *models)
    assert "the user runs it" in done.stdout.splitlines()
    assert done.stdout.splitlines()[-1].startswith(f"{file} is in the way: "), done.stderr


def test_what_is_imported_for_all_models_needs_no_quantize() -> None:
    for name in shadowing.LIGHT:
        for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.col_offset == 0:
                assert not (node.module or "").startswith("quantize"), name
