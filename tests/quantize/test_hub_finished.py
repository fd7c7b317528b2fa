"""``--resume`` where DST is complete and SRC's weights have left the hub's cache: what a commit
holds is known without them."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from quantize.checkpoint.json_files import read_json
from quantize.errors import QuantizeError
from quantize.run.leftovers import SOURCE
from quantize.run.made import made
from quantize.run.target import FOLDER
from tests.hub_server import Hub
from tests.quantize.checkpoints import contents
from tests.quantize.pushes import OPTIONS, hub, model
from tests.quantize.test_cli import refusal, run

__all__ = ["hub", "model"]  # fixtures

WEIGHTS, HEADERS = "model.safetensors", 20_000
"""A file of 100 kB, and bytes of it that reading headers takes at most."""


@pytest.fixture(params=[[], ["--stream"], ["--scales", "max"]], ids=" ".join)
def finished(
    request: pytest.FixtureRequest, hub: Hub, model: str, tmp_path: Path
) -> tuple[str | Path, ...]:
    """The command that made ``out``, of whose source nothing is in the cache any more."""
    words = ("quantize", "org/moe", tmp_path / "out", *OPTIONS, *request.param)
    assert run(*words).exit_code == 0
    shutil.rmtree(tmp_path / "cache")
    hub.sent.clear()
    return words


@pytest.mark.parametrize("more", [(), ("--push-to", "me/moe")], ids=["here", "pushed"])
def test_nothing_is_downloaded(
    finished: tuple[str | Path, ...], more: tuple[str, ...], hub: Hub, tmp_path: Path
) -> None:
    before = contents(tmp_path / "out")
    result = run(*finished, "--resume", *more)
    assert result.exit_code == 0, result.output
    assert 0 < hub.sent[WEIGHTS] < HEADERS
    assert contents(tmp_path / "out") == before
    assert not more or before.keys() <= hub.models["me/moe"].files.keys()


def test_a_dry_run_says_so(finished: tuple[str | Path, ...], hub: Hub, tmp_path: Path) -> None:
    result = run(*finished, "--resume", "--dry-run")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'out'} is complete already: nothing would be done" in result.output
    assert hub.sent[WEIGHTS] < HEADERS


@pytest.mark.parametrize("more", [[], ["--bits", "5"], ["--weight-only", "1"]], ids=str)
def test_nor_by_a_run_with_a_text(more: list[str], hub: Hub, trained: Path, tmp_path: Path) -> None:
    """Whose choices of formats are in DST, and need no measuring either."""
    (tmp_path / "a.txt").write_text("".join(f"x{n} = {n}\n" for n in range(999)))
    hub.publish("org/moe", trained)
    size = ("--calibration-rows", "4", "--calibration-length", "64", "--rounding", "gptq")
    words = ("quantize", "org/moe", tmp_path / "out", "--calibrate", tmp_path / "a.txt", *size)
    assert run(*words, *more).exit_code == 0
    before = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "cache")
    result = run(*words, *more, "--resume", "--dry-run")
    assert result.exit_code == 0 and "is complete already" in result.output, result.output
    result = run(*words, *more, "--resume")
    assert result.exit_code == 0, result.output
    assert contents(tmp_path / "out") == before
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


CHANGES = {
    "other options": lambda out: ("--layout", "compressed-tensors"),
    "a shard is gone": lambda out: next(out.glob("*.safetensors")).unlink(),
    "a shard is cut off": lambda out: _cut(next(out.glob("*.safetensors"))),
    "a file beside was edited": lambda out: (out / "LICENSE").write_text("another"),
    "the report was edited": lambda out: _edit(out / "nvfp4_moe_report.json"),
}


@pytest.mark.parametrize("dry", [False, True], ids=["run", "dry run"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_complete_is_refused_before_a_download(
    change: str, dry: bool, hub: Hub, model: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out, *OPTIONS)
    assert run(*words).exit_code == 0
    shutil.rmtree(tmp_path / "cache")
    hub.sent.clear()
    more = CHANGES[change](out)
    more = more if isinstance(more, tuple) else ()
    before = contents(out)
    said = refusal(*words, *more, "--resume", *["--dry-run"] * dry)
    assert f"{out} holds a checkpoint, but not a whole one of this source" in said
    assert contents(out) == before
    if dry or change != "the report was edited":  # by which alone the options are known
        assert hub.sent[WEIGHTS] < HEADERS


@pytest.mark.parametrize("noted", [True, False], ids=["source noted", "killed before"])
def test_an_interrupted_run_that_replaces_it_goes_on(
    noted: bool, hub: Hub, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though DST still has the report of the one before."""
    out = tmp_path / "out"
    words = ("quantize", "org/moe", out, *OPTIONS)
    assert run(*words).exit_code == 0

    def interrupt(*_: Any) -> None:
        raise QuantizeError("interrupted here")

    with monkeypatch.context() as patch:
        patch.setattr("quantize.execute.finish", interrupt)
        assert run(*words, "--scales", "max", "--overwrite").exit_code == 1
    shutil.rmtree(tmp_path / "cache")
    if not noted:
        (out / FOLDER / SOURCE).unlink()
    result = run(*words, "--scales", "max", "--resume")
    assert result.exit_code == 0, result.output
    assert run("verify", "org/moe", out).exit_code == 0
    assert made(read_json(out / "config.json"), "").scales == "max"


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def _edit(file: Path) -> None:
    file.write_text(file.read_text().replace('"of_commit":"', '"of_commit":"0', 1))
