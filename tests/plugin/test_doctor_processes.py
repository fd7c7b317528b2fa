"""The processes of doctor: what is told when one dies, who waits for whom, and what they leave."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from vllm_nvfp4_moe.doctor import children, compiling
from vllm_nvfp4_moe.doctor.compiling import preparing
from vllm_nvfp4_moe.doctor.layer import one_rank
from vllm_nvfp4_moe.doctor.work import alone

CPU = torch.device("cpu")


def _dies(how: str, emit: Callable[[Any], None]) -> None:
    emit({"what": "begins", "at": "a step"})
    if how == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hang":
        time.sleep(60)
    if how == "raise":
        raise RuntimeError("the device is gone")
    if how == "exit":
        os._exit(3)
    emit({"what": "done"})


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("segfault", "its process died of SIGSEGV, a step"),
        ("hang", "it was ended after 1 s, a step"),
        ("raise", "exit status 1, a step: Traceback"),
        ("exit", "its process ended with exit status 3, a step"),
        ("", None),
    ],
)
def test_a_process_that_dies_is_told_of(how: str, words: str | None) -> None:
    records, problem = children.run(_dies, how, seconds=1 if how == "hang" else 30)
    assert [r["what"] for r in records] == (["begins"] if words else ["begins", "done"])
    assert problem is None if words is None else words in str(problem)
    if how == "raise":
        assert "RuntimeError: the device is gone" in str(problem)


def _compiles(seconds: float, emit: Callable[[Any], None]) -> None:
    with preparing(0.2, emit):
        time.sleep(seconds)
    emit({"what": "done"})


@pytest.mark.parametrize("ends", [True, False])
def test_compiling_is_said_and_ends(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    """A process may take longer than its time by what it compiles, and by no more than a bound."""
    monkeypatch.setattr(compiling, "MOST", 60.0 if ends else 1.0)
    said: list[str] = []
    started = children.Started(_compiles, 4.0 if ends else 60.0)
    begin = time.monotonic()
    records, problem = started.finish(1.0, compiling.listener(said.append, "a kernel"))
    assert said == ["a kernel: compiling what never was compiled here; checks lose no time by that"]
    if ends:
        assert problem is None and records[-1] == {"what": "done"}
        assert compiling.compiled(records) == pytest.approx(3.8, abs=2)
    else:
        assert problem == "it was ended after 2 s" and time.monotonic() - begin < 30


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("seconds", [0.0, 0.01, 7.0])
def test_time_for_compiling_is_given_once(slow: bool, seconds: float) -> None:
    """Whether or not the record that it is slow came before the end, which is a matter of
    milliseconds."""
    hear = compiling.listener(lambda _: None, "a kernel")
    records: list[dict[str, Any]] = [{"what": compiling.SLOW}] if slow else []
    records.append({"what": compiling.PREPARED, "compiling": seconds})
    for _ in range(2):
        assert sum(map(hear, records)) == pytest.approx(seconds)


def test_who_takes_times_waits_for_others_so_long_and_no_longer(tmp_path: Path) -> None:
    with alone(tmp_path) as first, alone(tmp_path, 0.3) as second:
        assert first < 0.3 <= second < 30


def _waits(folder: Path, told: Any, emit: Callable[[Any], None]) -> None:
    with alone(folder):
        emit({"what": "ready"})
        emit({"what": "told", "of": told.get()})
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_makes_ready_before_it_is_told_what_to_do(tmp_path: Path) -> None:
    """And whoever takes times waits for it; not for ever, should it die."""
    started = children.Started(_waits, tmp_path, waits=True)
    eventually(lambda: "ready" in started.found.read_text())
    started.tell({"a": "job"})
    with alone(tmp_path):
        assert '"told"' in started.found.read_text()
        records, problem = started.finish(60)
    assert records == [{"what": "ready"}, {"what": "told", "of": {"a": "job"}}]
    assert "SIGKILL" in str(problem)
    assert not started.found.exists()


def _is_killed(_: Any) -> None:
    with one_rank(CPU):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_leaves_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert "SIGKILL" in str(children.run(_is_killed, seconds=60).problem)
    assert list(tmp_path.iterdir()) == []


def hangs(emit: Callable[[Any], None]) -> None:
    emit({"number": os.getpid()})
    time.sleep(60)


ORPHANS = """
import sys
from tests.plugin.test_doctor_processes import hangs
from vllm_nvfp4_moe.doctor import children
children.How.name = sys.argv[1]
children.run(hangs, seconds=60)
"""


def test_no_kernel_outlives_doctor(tmp_path: Path) -> None:
    """Not even one that is killed: the GPU is free again."""
    env = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", ORPHANS, "fork"]
    with subprocess.Popen(command, cwd=ROOT, env=env) as process:
        try:
            found = eventually(lambda: [f for f in tmp_path.glob("*/found") if f.read_text()])
            number = json.loads(found[0].read_text())["number"]
            assert Path(f"/proc/{number}").exists()
        finally:
            process.kill()
    eventually(lambda: not Path(f"/proc/{number}").exists() or _is_zombie(number))


def _is_zombie(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def eventually(found: Callable[[], Any]) -> Any:
    """What the function gives, once that is something."""
    deadline = time.monotonic() + 60
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value
