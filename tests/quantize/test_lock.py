"""One run a target."""

import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantize import execute as pipeline
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.execute import execute
from quantize.run import lock
from quantize.run.plan import plan
from quantize.run.record import FOLDER
from tests.conftest import ROOT
from tests.quantize import processes
from tests.quantize.checkpoints import ONE_THREAD
from tests.quantize.test_cli import refusal, run
from tests.quantize.user_files import KILLED, SIZE, tree


@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]])
def test_a_second_run_in_a_target(flags: list[str], source: Path, tmp_path: Path) -> None:
    """One message; and a run that died holds nothing."""
    out = tmp_path / "out"
    stopped = processes.run(tmp_path, "quantize", source, "out", *SIZE, at=40)
    assert stopped.code == KILLED
    # Its lock went with it. Another process takes it, as a run does.
    holding = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; "
         "from quantize.run.lock import locked\n"
         "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()",
         out / FOLDER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ONE_THREAD, cwd=ROOT,
    )  # fmt: skip
    assert holding.stdout is not None
    assert holding.stdout.readline() == b"held\n"
    before = tree(out)
    message = refusal("quantize", source, out, *SIZE, *flags)
    assert f"{out}: another run is at work in it" in message
    with Checkpoint(source) as checkpoint, pytest.raises(QuantizeError, match="another run"):
        execute(checkpoint, plan(checkpoint), out, overwrite=True)
    assert tree(out) == before
    holding.kill()
    holding.wait()
    assert run("quantize", source, out, *SIZE, "--resume").exit_code == 0
    assert not (out / FOLDER).exists()


def test_a_run_that_ends_before_the_lock(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more moment of the next test's, which meets it now and then: the other ends after it was
    seen that nothing is complete, and before this one has the lock."""
    out, kept = tmp_path / "out", lock.locked
    before = {}

    def locked(folder: Path) -> Any:
        if not before:
            before["none"] = {}
            with Checkpoint(source) as other:
                execute(other, plan(other), out)
            before["made"] = tree(out)
        return kept(folder)

    monkeypatch.setattr(pipeline, "locked", locked)
    with Checkpoint(source) as checkpoint:
        summary = execute(checkpoint, plan(checkpoint), out, resume=True)
    assert summary.bytes_read == 0 and tree(out) == before["made"]
    assert not (out / FOLDER).exists()


def test_two_runs_started_at_once(source: Path, tmp_path: Path) -> None:
    """As a scheduler may: one is done, or the second finds it complete; never two at work."""
    words = [str(Path(sys.executable).with_name("nvfp4-moe")), "quantize", source, "out", *SIZE]
    both = [
        subprocess.Popen(
            [*words, "--resume"], cwd=tmp_path, env=ONE_THREAD, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 0], [0, 1]), errors
    if codes == [0, 1]:
        assert sum("another run is at work" in error for error in errors) == 1, errors
    assert run("verify", source, tmp_path / "out").exit_code == 0


def test_a_lock_whose_file_goes_while_one_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its holder ends: what then locks the old file holds nothing, and tries again."""
    folder, tries = tmp_path / FOLDER, []
    acquire = lock._lock

    def ends(*what: Any) -> None:
        tries.append(what)
        if len(tries) == 1:
            (folder / lock.LOCK).unlink()
        acquire(*what)

    monkeypatch.setattr(lock, "_lock", ends)
    with lock.locked(folder):
        assert len(tries) == 2
        with pytest.raises(QuantizeError, match="another run is at work"):
            lock.check_unlocked(folder)


def test_the_lock_is_held_while_ray_is_at_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    seen = []

    def looking(*_: Any) -> None:
        with (out / FOLDER / "lock").open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                seen.append("held")
        raise QuantizeError("enough")

    monkeypatch.setattr(pipeline, "room_on_ray", lambda *_: 1)
    monkeypatch.setattr(pipeline, "make_shards_on_ray", looking)
    with Checkpoint(source) as checkpoint, pytest.raises(QuantizeError, match="enough"):
        execute(checkpoint, plan(checkpoint), out, ray="auto")
    assert seen == ["held"]
    assert tree(out) == {}
