"""``--stream`` and its disk: how much it takes at most, and one that takes no more."""

import errno
import hashlib
import json
import shutil
import time
from pathlib import Path

import huggingface_hub
import pytest

from quantize.checkpoint import streamed
from quantize.checkpoint.hub import look_up
from quantize.checkpoint.opened import opened
from quantize.checkpoint.streamed import AHEAD, peak
from quantize.errors import QuantizeError
from quantize.run.plan import plan
from quantize.run.record import Record
from quantize.run.shards import ShardWriter
from quantize.run.stream import bytes_beside
from tests.hub_server import Hub, Model, Stored
from tests.quantize.streams import OPTIONS, Watched, hub, model
from tests.quantize.test_cli import refusal, run
from tests.quantize.true_size import minimax_m3

__all__ = ["hub", "model"]  # fixtures


def test_the_peak_is_the_one_that_was_announced(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is asked for the peak, and has never more on it; one byte less is refused before
    anything is fetched."""
    seen = []
    real = shutil.disk_usage

    def usage(path: object) -> object:
        found = real(path)  # type: ignore[call-overload]
        return found._replace(free=room[0]) if room else found

    room: list[int] = []
    monkeypatch.setattr(shutil, "disk_usage", usage)
    asked = streamed.peak

    def told(*what: object) -> int:
        seen.append(asked(*what))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr("quantize.run.stream.peak", told)
    out = tmp_path / "out"
    with Watched(out) as watched:
        hub.before = watched.look
        assert run("quantize", "org/moe", out, *OPTIONS, "--stream").exit_code == 0
    (announced,) = set(seen)
    total = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    report = json.loads((out / "nvfp4_moe_report.json").read_text())
    # Headers and small files of the run's own are not counted.
    assert 0 < watched.most <= announced + 20_000
    assert announced < total + report["bytes_after"]
    others = sum((out / n).stat().st_size for n in ("README.md", "generation_config.json"))
    room.append(announced + others)
    assert run("quantize", "org/moe", tmp_path / "two", *OPTIONS, "--stream").exit_code == 0
    room[0] -= 1
    before = hub.sent.copy()
    said = refusal("quantize", "org/moe", tmp_path / "three", *OPTIONS, "--stream")
    assert "are still to be written" in said
    assert not [file for file in (tmp_path / "three").rglob("*") if file.is_file()]
    more = {name: hub.sent[name] - before[name] for name in hub.sent}
    assert all(more[name] <= 16 * 2**10 for name in more)


def test_the_peak_of_steps() -> None:
    """By hand."""
    sizes = dict.fromkeys("abcdefgh", 1)
    one = ["a", "b", "c", "d", "e", "f", "g", "h"]
    none = [0] * 8
    assert peak([], sizes, []) == 0
    assert peak(["a"], sizes, [0]) == 1
    assert peak(["ab", "bc", "cd"], sizes, none) == 4
    assert peak(one, sizes, none) == 1 + AHEAD
    assert peak(["ah", *one[1:7], "h"], sizes, none) == 2 + AHEAD
    assert peak([["x", "y"], ["z"]], {"x": 5, "y": 7, "z": 1}, none) == 13
    # What is made stays, and comes while the source goes: at the fourth step four files are ahead.
    assert peak(one, sizes, [10] * 8) == max(5 + 50, 4 + 60, 3 + 70, 2 + 80, 1 + 80)
    assert peak(["a"], sizes, [10]) == 11


DISK = {
    "read-only": OSError(errno.EROFS, "Read-only file system", "/out/.nvfp4_moe/source/x"),
    "permission": PermissionError(errno.EACCES, "Permission denied"),
    "a file in the way": NotADirectoryError(errno.ENOTDIR, "Not a directory"),
    "full": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    # As hf_xet 1.8.0 says them, which writes large files for the client of the true hub.
    "Xet, read-only": RuntimeError(
        "Task error: File reconstruction error: IO Error: Read-only file system (os error 30)"
    ),
    "Xet, full": RuntimeError(
        "Task error: File reconstruction error: IO Error: No space left on device (os error 28)"
    ),
}
"""How writing a file fails, and what the hub's client raises then."""


@pytest.mark.parametrize("kind", DISK)
def test_a_disk_of_dst_that_takes_no_more(
    kind: str, hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle. It is DST's disk, no other setting helps; the run goes on later."""
    out, real, count = tmp_path / "out", huggingface_hub.hf_hub_download, [0]

    def download(*args: object, **more: object) -> object:
        count[0] += 1
        if count[0] == 9:
            raise DISK[kind]
        return real(*args, **more)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    words = ("quantize", "org/moe", out, *OPTIONS, "--stream")
    said = refusal(*words)
    assert said.startswith(f"error: {out}/.nvfp4_moe/source: ")
    assert "HF_HUB_CACHE" not in said and "reading it from the hub" not in said
    full = kind.endswith(("full", "quota"))
    assert ("free some space, then go on by the same command with --resume" in said) == full
    assert ("DST must be a folder that you can write to" in said) == (not full)
    assert not (out / "config.json").exists()
    result = run(*words, "--resume")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("flags", [(), ("--overwrite",), ("--resume",)])
def test_a_file_where_the_folder_of_the_run_comes(
    flags: tuple[str, ...], hub: Hub, model: Path, tmp_path: Path
) -> None:
    there = tmp_path / "out" / ".nvfp4_moe"
    there.parent.mkdir()
    there.write_text("mine")
    said = refusal("quantize", "org/moe", tmp_path / "out", *OPTIONS, "--stream", *flags)
    assert f"error: {there}" in said and "HF_HUB_CACHE" not in said
    assert "choose another" in said
    assert there.read_text() == "mine"


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_a_file_that_cannot_be_finished(
    threads: int, hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full, say, as the second file of DST is brought to it: all others wait for that,
    and what is said is why."""
    real, count = ShardWriter.finish, [0]

    def finish(writer: ShardWriter) -> None:
        count[0] += 1
        if count[0] == 2:
            time.sleep(1)  # until whatever can go on has
            writer.abort()
            raise QuantizeError("the disk is full")
        real(writer)

    monkeypatch.setattr(ShardWriter, "finish", finish)
    words = ("quantize", "org/moe", tmp_path / "out", "--max-shard-size", "4KB", "--stream")
    start = time.monotonic()
    said = refusal(*words, "--threads", threads)
    assert "the disk is full" in said
    assert time.monotonic() - start < 30
    assert run(*words, "--resume").exit_code == 0


def test_minimax_m3_goes_through_a_disk_of_300_gb(hub: Hub, tmp_path: Path) -> None:
    """At true size, by holes: inspect is sent some megabytes of 852 GB, and 300 GB are enough for
    ``--stream``."""
    folder = minimax_m3(tmp_path / "m3")
    assert sum(file.stat().st_blocks * 512 for file in folder.iterdir()) < 20e6
    hub.models["org/m3"] = Model()
    hub.models["org/m3"].commit(
        {
            file.name: Stored(file, hashlib.sha256(file.name.encode()).hexdigest())
            if file.suffix == ".safetensors"
            else Stored(file.read_bytes())
            for file in folder.iterdir()
        }
    )
    with opened(look_up("org/m3"), stream=True) as checkpoint:
        steps = plan(checkpoint)
        assert 850e9 < checkpoint.nbytes < 860e9
        assert 250e9 < steps.nbytes < 265e9
        record = Record(tmp_path / "out", "")
        beside = bytes_beside(checkpoint, steps, record, range(len(steps.shards)))
        assert 15e9 < beside < 300e9 - steps.nbytes
    assert sum(hub.sent.values()) < 6e6
