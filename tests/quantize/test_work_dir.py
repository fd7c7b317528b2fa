"""``--work-dir``: calibration's large files elsewhere, and nobody else's touched there."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantize import execute as pipeline
from quantize.errors import QuantizeError
from tests.quantize.checkpoints import contents, convert
from tests.quantize.user_files import calibrate, tree


def test_calibration_elsewhere(source: Path, tmp_path: Path) -> None:
    """The target holds nothing but its shards, nothing is left, and the files are the same."""
    calibrate(source, tmp_path / "plain", "two-sided")
    work, out = tmp_path / "scratch" / "mine", tmp_path / "out"
    work.mkdir(parents=True)
    (work / "data.bin").write_bytes(b"mine")
    sizes: dict[str, int] = {}

    def looking(*args: Any) -> None:
        sizes.update(
            {
                str(path.relative_to(tmp_path)): path.stat().st_size
                for folder in (work, out)
                for path in folder.rglob("*")
                if path.is_file()
            }
        )

    calibrate(source, out, "two-sided", work_dir=work, calibrating=looking)
    (own,) = {name.split("/")[2] for name in sizes if name.startswith("scratch/mine/nvfp4_moe-")}
    assert any(name.startswith(f"scratch/mine/{own}/") and size > 10_000
               for name, size in sizes.items())  # fmt: skip
    large = [Path(n).suffix for n, size in sizes.items() if n.startswith("out/") and size > 10_000]
    assert set(large) == {".rounded"}
    assert tree(work) == {"data.bin": b"mine"}
    assert contents(out) == contents(tmp_path / "plain")


def stopped(source: Path, out: Path, work: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was interrupted once it was calibrated."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(pipeline, "make_shards", stop)
        calibrate(source, out, work_dir=work)


def test_going_on_with_a_calibration_elsewhere(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    stopped(source, out, work, monkeypatch)
    assert list(work.rglob("*.json"))
    before = tree(tmp_path)
    with pytest.raises(QuantizeError, match=r"was started --work-dir .*work; go on so"):
        calibrate(source, out, work_dir=tmp_path / "other", resume=True)
    assert tree(tmp_path) == before

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it is calibrated already")

    monkeypatch.setattr("quantize.calibration.calibrate.LayerwiseModel", fail)
    calibrate(source, out, resume=True)  # the record says where
    assert list(work.iterdir()) == []


def test_starting_again_removes_what_is_elsewhere(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out", tmp_path / "work"
    stopped(source, out, work, monkeypatch)
    convert(source, out, overwrite=True)
    assert list(work.iterdir()) == []


@pytest.mark.parametrize("what", ["a link", "a file", "a link within", "a file for DIR"])
def test_a_work_dir_that_is_not_safe(
    what: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work, mine = tmp_path / "out", tmp_path / "work", tmp_path / "mine"
    mine.mkdir()
    (mine / "a").write_bytes(b"mine")
    stopped(source, out, work, monkeypatch)
    (own,) = work.iterdir()
    shutil.rmtree(out)
    if what == "a link within":
        (own / "states").symlink_to(mine)
    else:
        shutil.rmtree(own)
        if what == "a link":
            own.symlink_to(mine)
        elif what == "a file":
            own.write_text("mine")
        else:
            work.rmdir()
            work.write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(QuantizeError, match=str(work)):
        calibrate(source, out, work_dir=work)
    assert {n: d for n, d in tree(tmp_path).items() if not n.startswith("out")} == before


def test_a_work_dir_of_another_user(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name follows from the target's, so on a shared disk anyone can make it first."""
    out, work = tmp_path / "out", tmp_path / "work"
    stopped(source, out, work, monkeypatch)
    before = tree(work)
    shutil.rmtree(out)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(QuantizeError, match=r"belongs to another user; give another --work-dir"):
        calibrate(source, out, work_dir=work)
    assert tree(work) == before
