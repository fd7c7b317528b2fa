"""Doctor as its users have it: where its result goes, its exit code, and whole runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from quantize.cli.errors import UsageError
from tests import doctor_runs
from tests.conftest import ROOT
from tests.hardware_results import problems_of
from vllm_nvfp4_moe.doctor import command
from vllm_nvfp4_moe.doctor.table import text

FIRST_SECOND = """
import os, runpy, signal, sys
which = sys.argv.pop(1)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.Signals[which])  # and go on with the import

sys.meta_path.insert(0, Finder())
runpy.run_module("vllm_nvfp4_moe.doctor", run_name="__main__")
"""


@pytest.mark.parametrize("which", ["SIGINT", "SIGTERM"])
def test_doctor_stopped_in_the_first_second(which: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", FIRST_SECOND, which], cwd=ROOT, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "interrupted: nothing was changed\n"


@pytest.mark.parametrize(("load", "told"), [(0.1, False), (5.7, True)])
def test_where_the_result_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float, told: bool
) -> None:
    """Refused before the minutes; a link (such as /dev/stdout) stays one. And it says if others
    kept the processors busy: a table made so had numba chosen."""
    for wrong in (tmp_path, tmp_path / "none" / "result.json"):
        with pytest.raises(UsageError, match=r"such folder|give a file"):
            command._check_writable(wrong)
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    found = {"verdict": {"right": True}}
    monkeypatch.setattr(command, "_shape", lambda *_: (None, []))
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.run.run", lambda *_: dict(found))
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.saved.save", lambda _: [])
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.table.text", lambda _: "a table")
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    command.doctor(None, False, None, link)
    assert link.is_symlink()
    written = json.loads(file.read_text())
    assert ["times are not to be trusted" in note for note in written.pop("notes")] == [True] * told
    assert written == found
    assert sorted(tmp_path.iterdir()) == [file, link]


def test_what_cannot_be_found_out_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1 says that a kernel is wrong, and nothing else does."""

    def ended() -> int:
        with pytest.raises((SystemExit, typer.Exit)) as code:
            command.doctor(str(tmp_path), False, None, None)
        found = code.value
        return int(found.code if isinstance(found, SystemExit) else found.exit_code)

    assert ended() == 2  # there is no checkpoint
    assert "error:" in capsys.readouterr().err
    monkeypatch.setattr(command, "_shape", lambda *_: (None, []))
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.saved.save", lambda _: [])
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.table.text", lambda _: "a table")
    verdict = {"verdict": {"right": False}}
    monkeypatch.setattr("vllm_nvfp4_moe.doctor.run.run", lambda *_: dict(verdict))
    assert ended() == 1

    def breaks(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_nvfp4_moe.doctor.run.run", breaks)
    assert ended() == 2


# The command, in processes of its own. What a fault is put in with lies on the path of modules.


SWAP = """
import sys
from vllm_nvfp4_moe.registration import when_imported
def put_in():
    from vllm_nvfp4_moe.backends.cpu.method import CpuMethod
    {fault}
when_imported("vllm_nvfp4_moe.doctor.run", put_in)
"""
AHEAD = "__import__('vllm_nvfp4_moe.doctor.run').doctor.run._AHEAD['cpu'] = True"
"""As on a GPU."""
CRASH = "CpuMethod.apply = lambda *_: __import__('os').kill(__import__('os').getpid(), 4)"


def doctor(tmp_path: Path, folder: Path, fault: str = "pass") -> tuple[int, str, Any]:
    """Exit code, output and JSON of ``doctor --quick`` on a checkpoint."""
    (tmp_path / "sitecustomize.py").write_text(SWAP.format(fault=fault))
    out = tmp_path / "out.json"
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "vllm_nvfp4_moe.doctor", str(folder), "--quick", "--json", out],
        env={**os.environ, "PYTHONPATH": path, "NVFP4_MOE_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr, json.loads(out.read_text())


@pytest.mark.parametrize("ahead", ["pass", AHEAD], ids=["one", "one and the next"])
def test_a_machine_that_is_right(tmp_path: Path, quantized: dict[str, Path], ahead: str) -> None:
    code, said, found = doctor(tmp_path, quantized["modelopt"], ahead)
    assert code == 0 and found["verdict"]["right"], said
    assert problems_of(found) == []
    assert [(layer["place"], layer["variant"]) for layer in found["layers"]] == [
        (place, variant) for place in ("whole", "slice")
        for variant in ("weights only", "4-bit activations")
    ]  # fmt: skip
    names = {k["name"]: k for k in found["layers"][0]["kernels"]}
    assert names["marlin"]["reason"] == "the platform is a CPU"
    assert names["hopper bf16"]["reason"] == "the device is not an NVIDIA GPU"
    ran = [k for k in names.values() if k["reason"] is None]
    assert {"cpu numba", found["layers"][0]["chosen"]} <= {k["name"] for k in ran}
    assert all(k["status"] == "right" for k in ran)
    assert all(row["floor"]["ms"] > 0 for k in ran for row in k["timed"])
    assert "| whole, weights only" in said and "VERDICT: what would be chosen here is right" in said
    # A busy machine leaves times out; both variants of a place share them.
    timed = {o["place"] for o in found["layers"] for k in o["kernels"] if k.get("timed")}
    assert "whole" in timed
    assert len(list((tmp_path / "cache" / "doctor").iterdir())) == 2 * len(timed)
    assert text(found)


@pytest.mark.parametrize("ahead", ["pass", AHEAD], ids=["one", "one and the next"])
def test_a_kernel_that_kills_its_process(
    tmp_path: Path, quantized: dict[str, Path], ahead: str
) -> None:
    code, said, found = doctor(tmp_path, quantized["modelopt"], f"{CRASH}; {ahead}")
    assert code == 1
    assert "its process died of SIGILL" in found["verdict"]["problems"][0], said
    assert problems_of(found) == []
    assert {k["status"] for layer in found["layers"] for k in layer["kernels"]} == {
        "failed", "cannot run",
    }  # fmt: skip


@pytest.mark.parametrize("fault", doctor_runs.FAULTS)
def test_a_fault_is_named_and_ends_with_1(tmp_path: Path, fault: str) -> None:
    """As tests/gpu/test_doctor.py has it of a GPU's kernels; here of numba's alone, for which a
    busy machine has the time."""
    small = doctor_runs.small_checkpoint(tmp_path / "small")
    cache = tmp_path / "cache"
    ran = doctor_runs.doctor(
        tmp_path / "run", str(small), "--tp", "1", fault=fault, cache=cache, CXX="/bin/false"
    )
    doctor_runs.check_found(ran, doctor_runs.FAULTS[fault], ["cpu numba"])
    assert not (cache / "doctor").exists()  # no table of a wrong kernel
