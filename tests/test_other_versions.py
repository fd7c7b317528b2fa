"""What ``make test-next`` runs tests with: another vLLM's Python, and our compiled extensions."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from tests import other_versions
from tests.__main__ import side_by_side
from tests.conftest import ROOT

METADATA = """Metadata-Version: 2.1
Name: vllm
Version: 7.1.0
Requires-Dist: {}
Requires-Dist: not-a-package>=2
Requires-Dist: extra-thing; extra == "more"
Requires-Dist: torch==99.0
Requires-Dist: a-gpu-package==1
"""


@pytest.fixture
def laid(tmp_path: Path) -> Path:
    """A wheel of three files over an installed package of four."""
    wheel = tmp_path / "vllm-7.1.0-cp38-abi3-linux.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("vllm/__init__.py", "from vllm import moved\nNEW = 1\n")
        archive.writestr("vllm/moved.py", "")
        archive.writestr("vllm/config.json", "{}")
        archive.writestr("vllm/_C.abi3.so", "for CUDA")
        archive.writestr("vllm-7.1.0.dist-info/METADATA", METADATA.format("packaging>=999"))
        archive.writestr("vllm-7.1.0.dist-info/entry_points.txt", "[a.group]\nb = c\n")
    installed = tmp_path / "installed" / "vllm"
    (installed / "deep").mkdir(parents=True)
    for name in ("__init__.py", "gone.py", "_C.abi3.so", "deep/_D.so"):
        (installed / name).write_text("old")
    other_versions.lay_over(wheel, installed, tmp_path / "laid")
    return tmp_path / "laid"


def test_python_is_the_new_ones_and_extensions_ours(laid: Path) -> None:
    files = {str(f.relative_to(laid)): f.read_text() for f in laid.rglob("*") if f.is_file()}
    assert {name: text for name, text in files.items() if name.startswith("vllm/")} == {
        "vllm/__init__.py": "from vllm import moved\nNEW = 1\n",
        "vllm/moved.py": "",
        "vllm/config.json": "{}",
        "vllm/_C.abi3.so": "old",
        "vllm/deep/_D.so": "old",
    }


def test_processes_import_it_and_its_version(laid: Path) -> None:
    path = os.pathsep.join([str(laid), str(ROOT)])
    assert other_versions.seen({"PYTHONPATH": path}, "vllm") == f"7.1.0+cpu {laid}"
    code = (
        "from importlib.metadata import entry_points as e; print(e(group='a.group').names)\n"
        "from vllm_nvfp4_moe.versions import unsupported_version; print(unsupported_version())"
    )
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.startswith("{'b'}\nvllm-nvfp4-moe needs vLLM ")
    assert "found 7.1.0+cpu" in done.stdout


def test_what_it_asks_for(laid: Path) -> None:
    found = [(str(r), there, all_) for r, there, all_ in other_versions.requirements(laid)]
    assert found == [
        ("packaging>=999", version("packaging"), True),
        ("not-a-package>=2", None, True),
        ("torch==99.0", version("torch"), False),
        ("a-gpu-package==1", None, False),
    ]


def test_the_plugin_tries_what_it_does_not_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_versions, "other_vllm", lambda wanted: tmp_path / wanted)
    monkeypatch.setenv("PYTHONPATH", "mine")
    for wanted, tried in (("0.33.9", {}), ("7.1.0", {"NVFP4_MOE_ANY_VLLM": "1"})):
        path = os.pathsep.join([str(tmp_path / wanted), str(ROOT), "mine"])
        expected = {"PYTHONPATH": path} | tried
        assert other_versions.environment_for(wanted, None) == expected


def test_half_of_it_is_never_left(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="no network"), other_versions.whole(tmp_path / "x") as new:
        new.mkdir()
        raise OSError("no network")
    assert list(tmp_path.iterdir()) == []
    with other_versions.whole(tmp_path / "x") as new:
        new.mkdir()
        (new / "y").touch()
    assert [*tmp_path.rglob("*")] == [tmp_path / "x", tmp_path / "x" / "y"]


def test_which_tests_depend_on_what() -> None:
    on_vllm = other_versions.tests_that_need({"vllm"})
    assert {"tests/plugin/test_layer.py", "tests/engine/test_engine.py"} < set(on_vllm)
    assert {"tests/test_operating.py", "tests/quantize/test_layouts.py"} < set(on_vllm)
    assert "tests/quantize/test_families.py" not in on_vllm
    both = other_versions.tests_that_need({"vllm", "transformers"})
    assert {"tests/quantize/test_families.py", *on_vllm} < set(both)
    assert not [name for name in both if name.startswith("tests/gpu")]
    for name in other_versions.QUICK:
        file, _, test = name.partition("::")
        assert f"def {test.partition('[')[0]}" in (ROOT / file).read_text()


def test_groups_of_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two at a time, each with its share of the cores; one that fails is not lost among others."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(6))
    for name in ("first", "second", "third"):
        said = f"import os\ndef test(): assert os.environ['OMP_NUM_THREADS'] == '3', '{name}'\n"
        wrong = said.replace("'3'", "'4'") if name == "second" else said
        (tmp_path / f"test_{name}.py").write_text(wrong)
    groups = [[str(tmp_path / f"test_{name}.py")] for name in ("first", "second", "third")]
    assert side_by_side(groups[0], [], groups[2]) == 0
    assert side_by_side(*groups) == 1
    output = capfd.readouterr().out
    assert output.count("1 passed") == 4
    assert "AssertionError: second" in output


def test_a_group_that_is_killed_is_told_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its pytest says nothing then, and the others' summaries look as if all had passed."""
    good, killed = tmp_path / "test_good.py", tmp_path / "test_killed.py"
    good.write_text("def test(): pass\n")
    killed.write_text("import os\ndef test(): os.kill(os.getpid(), 9)\n")
    assert side_by_side([str(good)], [str(killed)]) == -9
    assert f"pytest {killed}: killed by SIGKILL" in capfd.readouterr().out


def test_the_last_words_of_a_group_that_is_killed_are_at_the_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """CI keeps the end of a log: a group died of SIGABRT, and nothing said in which test."""
    good, killed, last = (tmp_path / f"test_{name}.py" for name in ("good", "killed", "last"))
    good.write_text("def test(): pass\n")
    last.write_text("def test(): pass\n")
    killed.write_text(
        "import os\n"
        "def test_of_a_process():\n    os.fork() or os.abort()\n    os.wait()\n"
        "def test_of_this_name():\n    os.abort()\n"
    )
    assert side_by_side([str(good)], [str(killed)], [str(last)]) == -6
    end = capfd.readouterr().out.partition(f"pytest {killed}: killed by SIGABRT")[2]
    assert "Fatal Python error: Aborted" in end
    assert "in test_of_this_name" in end and "in test_of_a_process" not in end
