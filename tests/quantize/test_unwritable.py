"""Folders that take no files: one error that says so and what to do, before anything is read."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from quantize.cli import quantize_command
from quantize.errors import QuantizeError
from quantize.run.lock import locked
from quantize.run.target import check_writable
from tests.quantize.test_cli import refusal

Folders = Callable[[str], Path]

NOWHERE = ["/proc/out", "/sys/out", "/sys/a/b/c", "/proc/self/out"]
"""Where not even root makes a folder."""


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Path:
        raise AssertionError("the source is looked at already")

    monkeypatch.setattr(quantize_command, "look_up", fail)


@pytest.mark.parametrize("target", NOWHERE)
def test_targets_that_cannot_be_made(target: str, saved: Folders, nothing_is_read: None) -> None:
    message = refusal("quantize", saved("qwen3_moe"), target)
    assert message.startswith(f"error: {target}: ")
    assert "DST must be a folder that you can write to: choose another one" in message


@pytest.mark.parametrize("flags", [["--overwrite"], ["--resume"]])
def test_targets_that_are_there_and_take_nothing(flags: list[str], saved: Folders) -> None:
    """Permissions do not tell: it is noticed when the lock is to be made, and said as well."""
    message = refusal("quantize", saved("qwen3_moe"), "/sys/kernel", *flags)
    assert "/sys/kernel" in message
    assert "choose another one" in message or "nothing to resume" in message
    with pytest.raises(QuantizeError, match="choose another one"), locked(Path("/sys/kernel/x")):
        pass


@pytest.mark.parametrize("there", [False, True])
def test_without_permission(
    there: bool, saved: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the system says it to others than root."""
    out = tmp_path / "out"
    if there:
        out.mkdir()
        monkeypatch.setattr(os, "access", lambda _, mode, **__: not mode & os.W_OK)
    else:

        def refuse(*_: object, **__: object) -> str:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.mkdtemp", refuse)
    message = refusal("quantize", saved("qwen3_moe"), out)
    assert f"{out}: Permission denied; DST must be a folder" in message


def test_a_work_dir_that_takes_nothing(
    saved: Folders, tmp_path: Path, nothing_is_read: None
) -> None:
    (tmp_path / "text.txt").write_text("some text")
    words = ("--calibrate", tmp_path / "text.txt", "--work-dir", "/proc/work")
    message = refusal("quantize", saved("qwen3_moe"), tmp_path / "out", *words)
    assert "/proc/work: " in message
    assert "--work-dir must be a folder that you can write to" in message
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_of_having_looked(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b", "DST")
    check_writable(tmp_path, "DST")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--calibrate", "--input-scales"])
@pytest.mark.parametrize("kind", ["missing", "an empty folder"])
def test_a_text_that_is_not_there(
    kind: str, option: str, saved: Folders, tmp_path: Path, nothing_is_read: None
) -> None:
    text = tmp_path / "texts"
    if kind != "missing":
        text.mkdir()
    message = refusal("quantize", saved("qwen3_moe"), tmp_path / "out", option, text)
    said = {"missing": "there is no such file or folder; give a text that is there"}
    assert f"{text}: {said.get(kind, 'holds no .txt')}" in message
    assert not (tmp_path / "out").exists()
