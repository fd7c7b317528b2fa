"""``python -m tests.gpu`` without a GPU: which jobs run beside which, and what is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.gpu.__main__ import HERE, Job, Run, main, read


def times(folder: Path, name: str) -> tuple[float, float]:
    """When a job that was made by :func:`noting` began and ended."""
    begin, end = (folder / f"{name}.log").read_text().splitlines()[1:]
    return float(begin), float(end)


def noting(name: str, pool: str, seconds: float = 0.3) -> Job:
    return Job(name, f"date +%s.%N; sleep {seconds}; date +%s.%N", pool)


def run(folder: Path, jobs: list[Job], gpus: int = 1, seconds: float = 60) -> dict[str, str]:
    """What became of each."""
    ended = Run(folder, gpus, seconds, 2, {}).all(jobs)
    return {each.name: each.why or str(each.status) for each in ended}


def beside(folder: Path, one: str, other: str) -> bool:
    """Whether two jobs ran at the same time."""
    (a, b), (c, d) = times(folder, one), times(folder, other)
    return a < d and c < b


@pytest.mark.parametrize("gpus", [1, 2])
def test_pools(tmp_path: Path, gpus: int) -> None:
    jobs = [
        noting("a", "shared", 1), noting("t", "timed"), noting("b", "shared", 1),
        noting("all", "all"), noting("u", "timed"), noting("c", "shared"),
    ]  # fmt: skip
    found = run(tmp_path, jobs, gpus)
    assert found.pop("all") == ("0" if gpus == 2 else "needs two GPUs")
    assert found == dict.fromkeys("atbuc", "0")
    assert beside(tmp_path, "a", "b") and not beside(tmp_path, "t", "u")
    assert times(tmp_path, "c")[0] > min(times(tmp_path, "a")[1], times(tmp_path, "b")[1])
    assert beside(tmp_path, "t", "a") == (gpus == 2)
    if gpus == 1:  # nothing is beside what is timed
        assert times(tmp_path, "u")[1] < times(tmp_path, "a")[0]
    else:
        assert all(times(tmp_path, name)[1] < times(tmp_path, "all")[0] for name in "abctu")
    assert {row["name"] for row in json.loads((tmp_path / "jobs.json").read_text())} == {
        *found, "all",
    }  # fmt: skip


@pytest.mark.parametrize(("pool", "gpu"), [("shared", "0"), ("timed", "2"), ("all", "unset")])
def test_each_pool_has_its_gpus(
    tmp_path: Path, pool: str, gpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    run(tmp_path, [Job("which", "echo ${{CUDA_VISIBLE_DEVICES-unset}}", pool)], gpus=3)
    assert (tmp_path / "which.log").read_text().splitlines()[1] == gpu


def test_what_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    child = "sleep 60 & echo $!; wait"
    found = run(tmp_path, [Job("slow", child, limit=0.5), Job("bad", "exit 3")])
    assert found == {"slow": "killed after 0 s", "bad": "3"}
    number = int((tmp_path / "slow.log").read_text().splitlines()[1])
    wait_until(lambda: not _alive(number))


def _alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", ["SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"])
def test_no_job_outlives_the_command(tmp_path: Path, number: str) -> None:
    """However it ends: the machine's GPUs are free again."""
    file = tmp_path / "jobs.toml"
    work = "sleep 60 & echo $!; echo $$; trap '' HUP INT TERM; wait; sleep 60"
    file.write_text(
        "".join(
            f'[[job]]\nname = "{pool}"\npool = "{pool}"\ncommand = "{work}"\n'
            for pool in ("shared", "timed")
        )
    )
    command = [sys.executable, "-m", "tests.gpu", str(tmp_path), "--jobs", str(file), "--gpus", "2"]
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup's processes ignore it otherwise
    try:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGHUP, before)
    with process:
        logs = [tmp_path / f"{pool}.log" for pool in ("shared", "timed")]
        wait_until(lambda: all(log.exists() and log.read_text().count("\n") == 3 for log in logs))
        working = [int(line) for log in logs for line in log.read_text().splitlines()[1:]]
        assert all(map(_alive, working))
        process.send_signal(getattr(signal, number))
        assert process.wait(10) != 0
    wait_until(lambda: not any(map(_alive, working)))


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_when_the_time_is_over_nothing_begins(tmp_path: Path) -> None:
    found = run(tmp_path, [noting(name, "timed", 5) for name in "ab"], seconds=0.5)
    assert found == {"a": "killed after 0 s", "b": "the time was over"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(
        '[[job]]\nname = "one"\ncommand = "echo {word} in {out}"\n'
        '[[job]]\nname = "two"\ncommand = "echo {other}"\n'
    )
    arguments = [str(tmp_path / "out"), "--jobs", str(file), "--gpus", "1", "--set", "word=hello"]
    assert main(arguments) == 1  # the second lacks a value
    assert "two: not run, 0 s, needs --set other=..." in capsys.readouterr().out
    assert (tmp_path / "out" / "one.log").read_text().splitlines()[1] == f"hello in {tmp_path}/out"
    assert main([*arguments, "other=x"]) == 0
    assert main([arguments[0], "one", *arguments[1:]]) == 0
    with pytest.raises(SystemExit):
        main([arguments[0], "three", *arguments[1:]])
    assert "has no job three" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[[job]]\nname = "a"\ncommand = ""\npool = "fast"', "pool is 'fast'"),
        ('[[job]]\nname = "a"\ncommand = ""\n[[job]]\nname = "a"\ncommand = ""', "have the name a"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "jobs.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=why):
        read(file)


def test_every_file_of_tests_for_gpus_is_in_a_job() -> None:
    commands = " ".join(job.command for job in read(HERE / "jobs.toml"))
    left = [file.name for file in HERE.glob("test_*.py") if file.name not in commands]
    assert left == []
