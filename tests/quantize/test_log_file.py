"""``--log-file``: all that is said, with its time; and never a file that is somebody else's."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from quantize.cli import output
from tests.quantize.test_cli import refusal, run
from tests.quantize.unattended import AMOUNT, PACE, logged, source

__all__ = ["source"]  # a fixture


def said(result: Any) -> list[str]:
    return [line.rstrip() for line in result.output.splitlines() if line.strip()]


def test_the_log_has_everything_that_is_said(source: Path, tmp_path: Path) -> None:
    """Of run after run: results, errors and tables too."""
    out, log = tmp_path / "out", tmp_path / "run.log"
    expected = []
    for command in (
        ("quantize", source, out),
        ("quantize", source, out),  # an error
        ("verify", source, out),
        ("verify", source, out, "--json"),
    ):
        result = run(*command, "--log-file", log)
        expected += said(result)
        assert sorted(logged(log)) == sorted(expected)
        assert "run.log" not in result.output
    assert [line for line in logged(log) if line.startswith("error: ")]
    assert "--log" not in (out / "nvfp4_moe_report.json").read_text()


def test_a_log_beside_bars(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, the log has lines where the terminal has bars."""
    monkeypatch.setattr(output.err, "_force_terminal", True)
    log = tmp_path / "run.log"
    result = run("quantize", source, tmp_path / "out", "--log-file", log)
    assert result.exit_code == 0, result.output
    last = [line for line in logged(log) if line.startswith("Quantizing: ")][-1]
    assert re.fullmatch(rf"Quantizing: .*{AMOUNT} of {AMOUNT}, {PACE}", last)
    assert last not in result.output
    assert "\x1b" not in log.read_text()


@pytest.mark.parametrize("where", ["src", "out"])
def test_a_log_among_a_checkpoint(where: str, source: Path, tmp_path: Path) -> None:
    src = Path(shutil.copytree(source, tmp_path / "src"))
    command = ("quantize", src, tmp_path / "out", "--log-file", tmp_path / where / "run.log")
    assert "which holds a checkpoint" in refusal(*command)
    assert {f.name for f in tmp_path.iterdir()} == {"src"}
    assert not (src / "run.log").exists()


def test_somebody_elses_file_is_not_added_to(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("of mine\n")
    assert "not a log of nvfp4-moe" in refusal("verify", source, "--log-file", file)
    assert file.read_text() == "of mine\n"


def test_a_log_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    """If that shows at once, nothing is done; a full disk does not end a run of hours."""
    nowhere = tmp_path / "no" / "such" / "run.log"
    said = refusal("quantize", source, tmp_path / "out", "--log-file", nowhere)
    assert "No such file" in said and "give a file that you can write to" in said
    assert not (tmp_path / "out").exists()
    result = run("quantize", source, tmp_path / "out", "--log-file", "/dev/full")
    assert result.exit_code == 0, result.output
    assert "warning: --log-file /dev/full: No space left on device" in result.stderr
    assert (tmp_path / "out" / "config.json").exists()
