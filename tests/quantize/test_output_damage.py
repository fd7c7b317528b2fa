"""Targets that cannot be written, or not to the end: a clear error, nothing that looks whole, and
with the cause removed ``--resume`` goes on."""

import errno
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from quantize.run.record import FOLDER
from tests.quantize.checkpoints import contents, convert
from tests.quantize.reference import INDEX
from tests.quantize.test_cli import refusal, run
from tests.quantize.test_damage import assert_not_a_checkpoint

Folders = Callable[[str], Path]

SIZE = ("--max-shard-size", "12KB")


class Disk:
    """A small file system of its own where mounting is allowed; else one that is imitated."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._patch = monkeypatch
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(folder)]
        self.real = shutil.which("mount") is not None and not self._fails(mount)

    def holds(self, nbytes: int) -> None:
        """From now on, no more than that, though the system promises more."""
        promised = shutil.disk_usage(self.folder)._replace(free=10**9)
        self._patch.setattr(shutil, "disk_usage", lambda _: promised)
        if self.real:
            self._remount(f"size={nbytes}")
        else:
            self._failing(errno.ENOSPC, "pwrite", "fsync", full=lambda: self._used() > nbytes)

    def is_read_only(self) -> None:
        if self.real:
            self._remount("ro")
        else:
            self._failing(errno.EROFS, "mkdir", "unlink", "replace", full=lambda: True)

    def is_repaired(self) -> None:
        self._patch.undo()
        if self.real:
            self._remount("rw,size=100m")

    def close(self) -> None:
        if self.real:
            subprocess.run(["umount", str(self.folder)], check=True)

    def _remount(self, options: str) -> None:
        assert not self._fails(["mount", "-o", f"remount,{options}", str(self.folder)])

    def _used(self) -> int:
        used = 0
        for file in self.folder.rglob("*"):
            with suppress(OSError):  # it may have got its name meanwhile
                used += file.stat().st_size * file.is_file()
        return used

    def _failing(self, number: int, *names: str, full: Callable[[], bool]) -> None:
        def failing(plain: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                if full():
                    raise OSError(number, os.strerror(number))
                return plain(*args, **kwargs)

            return call

        for name in names:
            self._patch.setattr(os, name, failing(getattr(os, name)))

    @staticmethod
    def _fails(command: list[str]) -> bool:
        return subprocess.run(command, capture_output=True).returncode != 0


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk", monkeypatch)
    yield made
    made.is_repaired()
    made.close()


@pytest.fixture(scope="session")
def source(saved: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a file beside its weights that takes some room."""
    folder = tmp_path_factory.mktemp("output_damage") / "source"
    shutil.copytree(saved("qwen3_moe"), folder)
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": list(range(3000))}))
    return folder


@pytest.fixture(scope="session")
def plain(source: Path) -> dict[str, bytes]:
    convert(source, source.parent / "plain", max_shard_size=12_000)
    return contents(source.parent / "plain")


@pytest.mark.parametrize("kilobytes", [*range(4, 100, 8)])
def test_a_disk_that_is_full(
    kilobytes: int, source: Path, plain: dict[str, bytes], disk: Disk
) -> None:
    """While the record, a shard, a copy, the report or the index is written."""
    out = disk.folder / "out"
    disk.holds(kilobytes * 1024)
    message = refusal("quantize", source, out, *SIZE)
    assert "No space left on device" in message
    assert str(disk.folder) in message or not disk.real
    assert_not_a_checkpoint(out)
    disk.is_repaired()
    resumed = run("quantize", source, out, *SIZE, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert contents(out) == plain


def test_overwriting_on_a_full_disk(source: Path, plain: dict[str, bytes], disk: Disk) -> None:
    """What is replaced makes room for what replaces it."""
    out = disk.folder / "out"
    assert run("quantize", source, out, *SIZE).exit_code == 0
    (out / "model-00099-of-00099.safetensors").write_bytes(bytes(1_000_000))
    index = json.loads((out / INDEX).read_text())
    index["weight_map"]["another"] = "model-00099-of-00099.safetensors"
    (out / INDEX).write_text(json.dumps(index))
    disk.holds(1_200_000)
    with (disk.folder / "more").open("wb", buffering=0) as more, suppress(OSError):
        while more.tell() < 10**6:
            more.write(bytes(4096))
            os.fsync(more.fileno())
    result = run("quantize", source, out, *SIZE, "--overwrite")
    assert result.exit_code == 0, result.output
    assert contents(out) == plain


@pytest.mark.parametrize("room", [44_000, 52_000, 60_000])
def test_what_a_full_disk_has_lost_is_not_counted_twice(
    room: int, source: Path, disk: Disk
) -> None:  # fmt: skip
    """A file of the output that was half made is made again."""
    out = disk.folder / "out"
    assert run("quantize", source, out).exit_code == 0
    disk.holds(1_200_000)
    with (disk.folder / "more").open("wb", buffering=0) as more, suppress(OSError):
        while more.tell() < 1_200_000:
            more.write(bytes(4096))
            os.fsync(more.fileno())
    os.truncate(disk.folder / "more", (disk.folder / "more").stat().st_size - room)
    result = run("quantize", source, out, "--overwrite", "--threads", "1")
    assert result.exit_code == 0, result.output
    last = [line for line in result.stderr.splitlines() if line.startswith("Quantizing: ")][-1]
    assert re.fullmatch(r"Quantizing: .*?([\d.]+ \w+) of \1, 100%.*", last), last


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_little_space_is_said_at_once(
    source: Path, plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - 20_000, 20_000))
        message = refusal("quantize", source, out, *SIZE)
    assert f"{out}: " in message
    assert "still to be written" in message
    assert "free" in message
    assert not list(out.iterdir())
    assert run("quantize", source, out, *SIZE).exit_code == 0
    assert contents(out) == plain


def test_space_is_needed_only_for_what_is_missing(
    source: Path, plain: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of an interrupted run holds most of it already."""
    out = tmp_path / "out"
    name = max(name for name in plain if name.endswith(".safetensors"))
    replace = Path.replace

    def failing(path: Path, target: Path) -> Path:
        if Path(target).name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", failing)
        assert "Input/output error" in refusal("quantize", source, out, *SIZE, "--threads", "1")
    copied = len(plain["tokenizer.json"]) + len(plain["generation_config.json"])
    free = len(plain[name]) + copied + 1000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 10**6 - free, free))
    resumed = run("quantize", source, out, *SIZE, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert contents(out) == plain


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a checkpoint"])
def test_a_read_only_disk(before: str, source: Path, disk: Disk) -> None:
    out = disk.folder / "out"
    if before == "an empty folder":
        out.mkdir()
    elif before == "a checkpoint":
        assert run("quantize", source, out).exit_code == 0
    kept = contents(disk.folder)
    disk.is_read_only()
    message = refusal("quantize", source, out, *(["--overwrite"] if len(kept) else []))
    assert "Read-only file system" in message
    disk.is_repaired()
    assert contents(disk.folder) == kept


def test_a_disk_that_becomes_read_only(source: Path, plain: dict[str, bytes], disk: Disk) -> None:
    """As after an error of the hardware; the next attempt to resume says it too."""
    out = disk.folder / "out"
    disk.holds(80 * 1024)  # the shards, but not the report
    refusal("quantize", source, out, *SIZE)
    assert (out / FOLDER / "run.json").exists()
    disk.is_repaired()
    disk.is_read_only()
    assert "Read-only file system" in refusal("quantize", source, out, *SIZE, "--resume")
    disk.is_repaired()
    assert run("quantize", source, out, *SIZE, "--resume").exit_code == 0
    assert contents(out) == plain


@pytest.mark.parametrize("where", ["a file", "below a file", "a broken link"])
def test_a_target_that_is_no_folder(where: str, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at" / "all")
    places = {"a file": "file", "below a file": "file/out", "a broken link": "link"}
    out = tmp_path / places[where]
    assert str(out) in refusal("quantize", source, out, "--overwrite")
    assert (tmp_path / "file").read_text() == "mine"
