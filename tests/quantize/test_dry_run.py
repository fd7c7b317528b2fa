"""``--dry-run``: what the run would do, or why it is refused; and nothing is done."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from quantize.errors import QuantizeError
from tests.quantize.test_cli import refusal, run
from tests.quantize.unattended import source

__all__ = ["source"]  # a fixture


def everything(folder: Path) -> dict[str, tuple[float, bytes]]:
    """All that is below it, folders too, with times."""
    return {
        str(f.relative_to(folder)): (f.stat().st_mtime, f.read_bytes() if f.is_file() else b"")
        for f in folder.rglob("*")
    }


def table_of(shown: str, title: str) -> list[list[str]]:
    """The rows of a table."""
    lines = re.split(r"┡.*┩\n", shown[shown.index(title) :], maxsplit=1)[1].splitlines()
    rows = lines[: next(n for n, line in enumerate(lines) if "└" in line)]
    return [[cell.strip() for cell in row.strip("│ ").split("│")] for row in rows]


@pytest.mark.parametrize("more", [(), ("--base", "mxfp8", "--exclude", "*.layers.0.*")], ids=str)
def test_a_dry_run_says_what_the_run_then_does(
    more: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    from rich.filesize import decimal

    command = ("quantize", source, tmp_path / "out", "--max-shard-size", "20KB", *more)
    before = everything(tmp_path)
    dry = run(*command, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert everything(tmp_path) == before == {}
    said = table_of(dry.stdout, "Files in")
    layers = "1" if more else "0-1"
    ((*row, nbytes),) = table_of(dry.stdout, "Experts")
    assert row == [layers, "4", "32", "48", "silu", "nvfp4"]
    assert re.search(r"Time: about [\d.]+ s; .* are read and made into files at", dry.stdout)
    assert re.search(r"Memory: .* for \d+ threads", dry.stdout)
    assert run(*command).exit_code == 0
    there = {f.name: f.stat().st_size for f in (tmp_path / "out").iterdir()}
    assert {name for name, *_ in said} == there.keys()
    sizes = {name: size for name, _, size, _ in said if size}
    assert len(sizes) > 3
    assert sizes == {name: decimal(there[name]) for name in sizes}
    report = json.loads((tmp_path / "out" / "nvfp4_moe_report.json").read_text())
    assert nbytes == decimal(sum(layer["bytes_after"] for layer in report["layers"]
                                 if "experts" in layer["prefix"]))  # fmt: skip


def test_a_dry_run_of_what_is_begun(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --resume it says what is left; with --overwrite, what goes; of what is complete, that
    nothing would be done."""
    command = ("quantize", source, tmp_path / "out", "--max-shard-size", "20KB", "--threads", "1")

    def fail(*_: object, **__: object) -> None:
        raise QuantizeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr("quantize.execute.finish", fail)
        assert run(*command).exit_code == 1
    next((tmp_path / "out").glob("model-00002-*")).unlink()
    before = everything(tmp_path)
    dry = run(*command, "--resume", "--dry-run").stdout
    states = {row[0]: row[3] for row in table_of(dry, "Files in") if row[0].startswith("model-0")}
    assert list(states.values()) == ["there already", "made", "there already"]
    assert everything(tmp_path) == before
    assert run(*command, "--resume").exit_code == 0
    before = everything(tmp_path)
    assert "nothing would be done" in run(*command, "--resume", "--dry-run").stdout
    dry = run(*command, "--overwrite", "--dry-run").stdout
    assert f"{tmp_path / 'out' / 'config.json'}: would be removed" in dry
    assert everything(tmp_path) == before


def test_a_dry_run_is_refused_as_the_run_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(code: int, *words: object) -> None:
        before = everything(tmp_path)
        command = ("quantize", source, tmp_path / "out", *words)
        said = refusal(*command, "--dry-run", code=code)
        assert everything(tmp_path) == before
        assert said == refusal(*command, code=code)

    refused(1, "--include", "nothing")
    refused(2, "--overwrite", "--resume")
    full = shutil._ntuple_diskusage(10, 10, 0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: full)
        refused(1)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "mine.txt").write_text("")
    refused(1)


SIZE = ("--calibration-rows", "4", "--calibration-length", "64", "--include", "*.layers.[13].*")


@pytest.mark.parametrize(
    "more", [("--rounding", "gptq"), ("--bits", "5", "--rounding", "gptq")], ids=str
)
def test_a_dry_run_of_a_calibration(more: tuple[str, ...], trained: Path, tmp_path: Path) -> None:
    """Time, memory and disk, though nothing is run."""
    text = tmp_path / "a.txt"
    text.write_text("".join(f"x{n} = {n}\n" for n in range(999)))
    before = everything(tmp_path)
    command = ("quantize", trained, tmp_path / "out", "--calibrate", text, *SIZE, *more)
    dry = run(*command, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert everything(tmp_path) == before
    assert re.search(r"Calibration: about .* of memory; .* of hidden states on", dry.stderr)
    assert re.search(r"Calibration: about .* for one of \d+ experts", dry.stderr)
    assert re.search(r"Disk: .* of hidden states in .*/out/.nvfp4_moe/calibration \(", dry.stdout)
    assert re.search(r"Time: about ", dry.stdout)
    measures = re.search(r"Measuring layers' losses for --bits: about .* for one of", dry.stderr)
    assert bool(measures) is ("--bits" in more)
    if "--bits" in more:
        assert re.search(r"--bits 5: layers' formats are known once .* at most ", dry.stderr)
