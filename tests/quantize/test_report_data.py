"""``nvfp4_moe_report.json``: all that the page shows, as valid JSON that can be read back."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.report import (
    BaseReport,
    BitsReport,
    CalibrationReport,
    ExpertStats,
    LayerReport,
    RunReport,
    dumps,
    loads,
    render,
)
from quantize.run.report_files import REPORT, REPORT_DATA
from quantize.run.sessions import Machine, Session
from tests.conftest import ROOT
from tests.quantize.checkpoints import convert
from tests.quantize.test_report import NASTY, changed, layer, run

NAN = math.nan
STATS = ExpertStats(
    [5, 0], ["gptq", "mse"], [[0.1, math.inf], [NAN, NAN]], [[0.05, 0.06], [NAN, NAN]]
)
FULL = run(
    layer(0),
    changed(layer(1, experts=2, calibration=STATS), 1, (NAN, 0.0, math.inf)),
    layer(2, projections=("up", "down"), errors=[(0.1, 0.1)], prefix=NASTY),
    layer(3, prefix="a\ud800b"),
    dense=layer(4, projections=("weight",), errors=[(0.1,)], names=("lm_head",), gate=""),
    calibration=CalibrationReport(NASTY, 4, 128, "gptq", False, 32, "max", "cd" * 32),
    fingerprint="0123abcd",
    bits=BitsReport(
        4.75,
        4.7,
        {"layers.0": "nvfp4", NASTY: "fp8"},
        {NASTY: {"nvfp4": 0.5, "fp8": 0.001}},
        [BaseReport("fp8", [f"{NASTY}.experts.0.up_proj"], [NAN], 16, 8)],
    ),
    revision=NASTY,
    source_digest="ab" * 32,
    sessions=[
        Session("2026-11-30T05:16:12+00:00", {NASTY: 3.0}, Machine(NASTY, NASTY, 2, 9, [], None)),
        Session(
            "2026-12-01T05:16:12+00:00",
            {"checks": 0.0, "calibration": 4000.0},
            Machine("Linux", "EPYC", 16, 2**37, ["H200 (150 GB)"] * 8, "13.0"),
            16,
        ),
    ],
)


def strict(text: str) -> Any:
    """JSON as RFC 8259 has it: without NaN and Infinity."""

    def refuse(name: str) -> None:
        raise AssertionError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("report", [FULL, run(), run(layer(0)), replace(FULL, dense=None)])
def test_what_is_written_is_read(report: RunReport) -> None:
    again = loads(dumps(report))
    assert dumps(again) == dumps(report)
    assert repr(again) == repr(report)  # NaN is not equal to itself
    assert render(again) == render(report)


def test_the_same_run_gives_the_same_bytes() -> None:
    assert dumps(run(layer(0), layer(1))) == dumps(run(layer(0), layer(1)))


def test_fields() -> None:
    data = strict(dumps(FULL))
    assert data["version"] == 1
    assert data["fingerprint"] == "0123abcd"
    assert data["source"] == "org/source"
    assert data["layers"][1]["errors"] == [list(layer(1).errors[0]), [None, 0.0, "Infinity"]]
    assert data["layers"][0]["calibration"] is None
    assert data["layers"][1]["calibration"] == {
        "tokens": [5, 0],
        "rules": ["gptq", "mse"],
        "before": [[0.1, "Infinity"], [None, None]],
        "after": [[0.05, 0.06], [None, None]],
    }
    assert data["dense"]["names"] == ["lm_head"]
    assert data["calibration"]["num_samples"] == 4
    assert data["calibration"]["sequence_length"] == 128
    assert data["calibration"]["min_tokens"] == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a report"),
        ("[]", "not a report"),
        ("{}", "not a report"),
        ('{"version":1}', "not a report"),
        ('{"version":2}', "version 2"),
        (dumps(FULL).replace('"bytes_before"', '"bytes"'), "not a report"),
        (dumps(FULL).replace("0.06", '"large"'), "not a report"),
        (dumps(FULL).replace("4000.0", '"long"'), "not a report"),
        (dumps(FULL).replace('"cores":16', '"cores":"16"'), "not a report"),
        ("[" * 100_000, "not a report"),
    ],
)
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(QuantizeError, match=message):
        loads(text)


def test_older_reports_are_read() -> None:
    """What they do not have is empty."""
    data = strict(dumps(FULL))
    for name in ("revision", "source_digest", "sessions"):
        del data[name]
    del data["calibration"]["digest"]
    again = loads(json.dumps(data))
    assert (again.revision, again.source_digest, again.sessions) == (None, "", [])
    assert again.calibration is not None
    assert again.calibration.digest == ""
    assert "Started" not in render(again)


def test_the_page_says_where_and_how_long() -> None:
    page = render(FULL)
    assert "<dt>Started</dt>" in page
    assert "<dt>Resumed</dt>" in page
    assert "<b>67 min</b>: calibration 67 min" in page
    assert "8 \N{MULTIPLICATION SIGN} H200 (150 GB), EPYC, 16 cores, 137.4 GB, Linux, CUDA" in page
    assert "CUDA 13.0; a Ray cluster with room for 16 tasks" in page
    assert "ab" * 32 in page
    assert "cd" * 32 in page


def test_a_run_leaves_both(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """The page is of the data alone; files of an earlier run's report are not copied over it."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(saved("qwen3_moe"), source)
    (source / REPORT).write_text("of an earlier run")
    (source / REPORT_DATA).write_text("{}")
    convert(source, out)
    written = loads((out / REPORT_DATA).read_bytes())
    assert render(written) == (out / REPORT).read_text(encoding="utf-8")
    assert written.target == "out"
    assert written.fingerprint
    with Checkpoint(source) as before, Checkpoint(out) as after:
        assert (written.bytes_before, written.bytes_after) == (before.nbytes, after.nbytes)
        scales = sum(
            math.prod(info.shape)
            for name, info in after.stored.items()
            if name.endswith(".weight_scale")
        )
    assert sum(sum(part.scale_counts) for part in written.layers) == scales
    times = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert convert(source, out, resume=True).bytes_read == 0
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == times


def test_the_documentation_has_every_field() -> None:
    page = (ROOT / "docs" / "users" / "report.md").read_text(encoding="utf-8")
    kinds = (
        RunReport, LayerReport, ExpertStats, CalibrationReport, BaseReport, BitsReport, Session,
        Machine,
    )  # fmt: skip
    for kind in kinds:
        for field in fields(kind):
            assert f"`{field.name}`" in page
            assert f'"{field.name}"' in page  # in the example


def test_jinja_is_loaded_for_a_page_alone() -> None:
    code = "import sys, quantize.report; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
