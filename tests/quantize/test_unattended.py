"""Runs that people leave alone: what they say meanwhile, with ``--quiet``, and at the end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from quantize.cli import progress
from tests.quantize.test_cli import run
from tests.quantize.test_evaluate_run import made, words  # noqa: F401  (a fixture)
from tests.quantize.unattended import AMOUNT, PACE, logged, source

__all__ = ["source"]  # a fixture


@pytest.fixture
def every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for every update, not for every minute, and with all that it could say."""
    monkeypatch.setattr(progress, "ENOUGH_SECONDS", 0)
    monkeypatch.setattr(progress, "ENOUGH_SHARE", 0)

    class Told(progress.Shown):
        def update(self, work: progress.Work) -> None:
            super().update(work)
            self.print()

    monkeypatch.setattr(progress, "Shown", Told)


@pytest.mark.usefixtures("every_update")
def test_what_the_lines_of_each_command_have(
    source: Path, made: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """Layer, expert, bytes, GB/s and time left."""
    one = ("--threads", "1")
    quantized = run("quantize", source, tmp_path / "out", *one).stderr
    against = run("verify", source, tmp_path / "out").stderr
    alone = run("verify", tmp_path / "out").stderr
    evaluated = run(*words(made)).stderr
    expert = r"layer [01], expert [0-3]"
    for said, what in (
        (quantized, rf"Quantizing: {expert}, {AMOUNT} of {AMOUNT}, {PACE}"),
        (against, rf"Verifying: {expert}, {AMOUNT} of {AMOUNT}, {PACE}"),
        (alone, rf"Verifying: {expert}, {AMOUNT} of {AMOUNT}, {PACE}"),
        (evaluated, rf"Evaluating: layer 1 of SRC, expert 2 of 4, {AMOUNT} read, {PACE}"),
        (evaluated, rf"Evaluating: layer 0 of DST, expert 4 of 4, {AMOUNT} read, {PACE}"),
    ):
        lines = said.splitlines()
        found = [line for line in lines if re.fullmatch(what, line)]
        assert found, said
        assert any(" left" in line for line in found) or "Evaluating" in what
    for said in (quantized, against, alone):
        *_, last = (line for line in said.splitlines() if "%" in line)
        assert re.fullmatch(r".*?([\d.]+ \w+) of \1, 100%, .*B/s", last), last


@pytest.mark.parametrize("imported", ["before", "within"])
def test_quiet_hub(imported: str) -> None:
    """The hub's client tells of each time that it tries again, as when it is asked too often."""
    code = f"""
from quantize.cli.output import speaking
def retry():
    from huggingface_hub.utils import logging
    logging.get_logger("huggingface_hub.utils._http").warning("HTTP Error 429 thrown. Retrying")
if {imported == "before"}:
    retry()
with speaking(quiet=True):
    retry()
with speaking():
    retry()
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stderr.count("Retrying") == (2 if imported == "before" else 1)


def test_quiet(source: Path, made: Path, tmp_path: Path) -> None:  # noqa: F811
    """Nothing but errors and what was asked for; all of it is in the log."""
    out, log = tmp_path / "out", tmp_path / "run.log"
    result = run("quantize", source, out, "--quiet", "--log-file", log)
    assert (result.exit_code, result.output) == (0, "")
    assert [line for line in logged(log) if "B/s" in line]
    assert run("verify", source, out, "--quiet").output == ""
    result = run("quantize", source, out, "--quiet")
    assert result.exit_code == 1 and result.stdout == ""
    assert re.fullmatch(r"error: .* is not empty; .*\n", result.stderr)
    (out / "generation_config.json").write_text("{}")
    result = run("verify", source, out, "--quiet")
    assert result.exit_code == 1
    assert [line[:9] for line in result.output.splitlines()] == ["problem: "]
    result = run("verify", source, out, "--quiet", "--json")
    assert json.loads(result.stdout)["problems"]
    result = run(*words(made), "--quiet")
    assert result.stderr == "" and "perplexity" in result.stdout
    assert "B/s" in run("quantize", source, tmp_path / "again").output  # it is over


@pytest.mark.parametrize("name", ["out", "an out"])
def test_where_the_report_is_and_how_to_serve(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = run("quantize", source, name).stdout.splitlines()
    report = next(line for line in lines if line.startswith("Report: "))
    page, data = re.fullmatch(r"Report: (.*) \(as data: (.*)\)", report).groups()  # type: ignore[union-attr]
    assert Path(page).is_file() and (Path(page).parent / data).is_file()
    quoted = name if name == "out" else f"'{name}'"
    assert lines[-1] == f"Serve:  vllm serve {quoted} --quantization nvfp4_moe"
