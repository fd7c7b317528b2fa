"""Rounded experts go straight into the shards: once on the disk, and exact after any loss."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantize import execute as pipeline
from quantize.errors import QuantizeError
from tests.quantize import user_files
from tests.quantize.checkpoints import contents
from tests.quantize.user_files import calibrate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers are in the same."""
    small = user_files.calibration
    monkeypatch.setattr(
        user_files, "calibration", lambda *args: replace(small(*args), max_shard_size=10**9)
    )


@pytest.fixture
def plain(source: Path, tmp_path: Path) -> dict[str, Any]:
    """A run that nothing happens to."""
    calibrate(source, tmp_path / "plain")
    return contents(tmp_path / "plain")


class Stopped(BaseException):
    """As a kill would."""


def stopped(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A run that was stopped once it was calibrated; the partial shards."""

    def stop(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(pipeline, "make_shards", stop)
        calibrate(source, out)
    return sorted((out / ".nvfp4_moe").glob("*.rounded"))


def layers_in(file: Path) -> set[str]:
    """The layers that a shard has experts of."""
    data = file.read_bytes()
    names = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name.split(".experts.")[0] for name in names if ".experts." in name}


def test_experts_are_on_the_disk_once(
    source: Path, plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    partial = stopped(source, out, monkeypatch)
    assert len(partial) > 2
    files = [file for file in out.rglob("*") if file.is_file() and file not in partial]
    assert all(file.suffix in (".json", ".lock", "") for file in files), files
    calibrate(source, out, resume=True)
    assert contents(out) == plain
    assert not (out / ".nvfp4_moe").exists()


@pytest.mark.usefixtures("one_shard")
@pytest.mark.parametrize("loss", ["gone", "cut off", "another header"])
def test_a_partial_shard_that_was_lost_is_calibrated_again(
    loss: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the run that does so is stopped when it has begun the shard anew: what was in it
    before is not taken for done."""
    out = tmp_path / "out"
    calibrate(source, tmp_path / "plain")
    (first,) = stopped(source, out, monkeypatch)
    assert len(layers_in(first)) == 2
    if loss == "gone":
        first.unlink()
    elif loss == "cut off":
        first.write_bytes(first.read_bytes()[:-1])
    else:
        first.write_bytes(b"\x08" + first.read_bytes()[1:])
    seen: list[str] = []

    def stop(done: float, steps: int, where: str) -> None:
        seen.append(where)
        if "expert" in where:
            raise Stopped

    with pytest.raises(Stopped):
        calibrate(source, out, resume=True, calibrating=stop)
    assert seen[0] == "layer 0"
    calibrate(source, out, resume=True)
    assert contents(out) == contents(tmp_path / "plain")


def test_a_partial_shard_that_is_lost_at_the_last_moment(
    source: Path, plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    make = pipeline.make_shards

    def losing(*args: Any) -> None:
        for file in (out / ".nvfp4_moe").glob("*.rounded"):
            file.unlink()
        make(*args)

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "make_shards", losing)
        with pytest.raises(QuantizeError, match=r"what calibration has rounded is gone.*--resume"):
            calibrate(source, out)
    assert not (out / "config.json").exists()
    calibrate(source, out, resume=True)
    assert contents(out) == plain
