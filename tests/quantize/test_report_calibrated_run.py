"""The report of a calibrated run, from what was staged: charts, totals, odd findings, resuming."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantize import execute
from quantize.calibration.samples import digest_of
from quantize.checkpoint.reader import Checkpoint
from quantize.report import (
    CalibrationReport,
    ExpertStats,
    LayerReport,
    RunReport,
    loads,
    render,
)
from quantize.report import collect as results
from quantize.run.options import MIN_TOKENS, Calibration, Options
from quantize.run.plan import plan
from quantize.run.report_files import REPORT, REPORT_DATA
from quantize.run.staged import Findings, Staged
from tests.quantize.test_report import TIMES, Node, Tree, layer, parse, run

ARROW, DASH = "\N{RIGHTWARDS ARROW}", "\N{EN DASH}"
SETTINGS = CalibrationReport("texts.jsonl", 128, 2048, "descent", False, 32)

FINDINGS = Findings(
    "model.layers.3.mlp.experts",
    tokens=[4000, 31, 32, 0, 1_234_567, 500, 90, 7],
    rules=["descent", "mse", "descent", "mse", "descent", "descent", "descent", "mse"],
    before=[[0.10, 0.20], [0.11, 0.21], [0.12, 0.22], [math.nan, math.nan],
            [0.13, 0.23], [0.14, 0.24], [0.15, 0.25], [0.16, 0.26]],
    after=[[0.08, 0.16], [0.11, 0.21], [0.09, 0.23], [math.nan, math.nan],
           [0.10, 0.18], [0.11, 0.19], [0.12, 0.20], [0.16, 0.26]],
)  # fmt: skip


def given(findings: Findings, **more: Any) -> ExpertStats:
    parts = {name: getattr(findings, name) for name in ("tokens", "rules", "before", "after")}
    return ExpertStats(**(parts | more))


def calibrated(*layers: LayerReport, **more: Any) -> RunReport:
    return run(*layers, calibration=replace(SETTINGS, **more))


def nth(row: int, root: Node) -> Node:
    return root.one("details", id=f"calibration-{row}")


def columns(line: Node) -> list[str]:
    """Tokens, output errors and rules."""
    return [column.text for column in line.children[2:] if isinstance(column, Node)]


def listed(details: Node) -> dict[str, str]:
    terms, said = details.all("dt"), details.all("dd")
    return {term.text: words.text for term, words in zip(terms, said, strict=True)}


def heights(details: Node) -> list[float]:
    """Of the chart's bars, as parts of the largest."""
    path = details.one("svg", class_="coverage").one("path", class_="bar").attributes["d"]
    first = re.match(r"M0 (\d+)", path)
    assert first
    bottom = int(first[1])
    return [(bottom - int(y)) / bottom for y in re.findall(r"V(\d+)h1", path)]


@pytest.fixture(scope="module")
def page() -> Node:
    """Two layers like any other around one that ``FINDINGS`` are of."""
    usual = ExpertStats([50] * 8, ["descent"] * 8, [[0.1, 0.1]] * 8, [[0.05, 0.075]] * 8)
    middle = replace(layer(3), calibration=given(FINDINGS))
    return parse(
        calibrated(
            replace(layer(2), calibration=usual), middle, replace(layer(4), calibration=usual)
        )
    )


def test_tokens_errors_and_rules_of_a_layer(page: Node) -> None:
    tokens, errors, rules = columns(nth(1, page).one("summary"))
    # In order 0, 7, 31, 32, 90, 500, 4000, 1234567; by hand, without the expert that has none:
    # 0.91 / 7 and 0.77 / 7, 1.61 / 7 and 1.43 / 7.
    assert tokens == "0 61 1,234,5673 below 32"
    minus = "\N{MINUS SIGN}"
    assert errors == (
        f"gate, up 0.1300 {ARROW} 0.1100 ({minus}15.4%)down 0.2300 {ARROW} 0.2043 ({minus}11.2%)"
    )
    assert rules == "5 descent3 mse"
    tokens, errors, rules = columns(nth(0, page).one("summary"))
    assert (tokens, rules) == ("50 50 50", "8 descent")
    assert f"0.1000 {ARROW} 0.05000 ({minus}50.0%)" in errors


def test_all_layers_together(page: Node) -> None:
    tokens, errors, rules = columns(page.one(class_="total"))
    assert tokens == "0 50 1,234,5673 below 32"
    assert rules == "21 descent3 mse"
    before, after = (0.91 + 16 * 0.1) / 23, (0.77 + 16 * 0.05) / 23
    assert errors.startswith(f"gate, up {before:.4f} {ARROW} {after:#.4g} ")


def test_each_expert_has_its_tokens_and_rule(page: Node) -> None:
    table = page.one(id="e1-0")
    assert [cell.text for cell in table.all("td")][-2:] == ["4,000", "descent"]
    for expert, (tokens, rule) in enumerate(zip(FINDINGS.tokens, FINDINGS.rules, strict=True)):
        cells = [cell.text for cell in page.one(id=f"e1-{expert}").all("td")]
        assert cells[-2:] == [f"{tokens:,}", rule]
    (head,) = [t for t in page.all("table", class_="numbers") if t.one("caption").text == "layer 3"]
    names = [name.text for name in head.one("thead").all("th")]
    assert names == ["expert", "combined", "gate", "up", "down", "tokens", "rule"]


def test_the_chart(page: Node) -> None:
    tokens = [100, 50, 200, 31, 0, 150, 40, 32]
    root = parse(
        calibrated(layer(2), replace(layer(3), calibration=given(FINDINGS, tokens=tokens)))
    )
    details = nth(1, root)
    assert heights(details) == pytest.approx([n / 200 for n in tokens], abs=0.0025)
    chart = details.one("svg", class_="coverage")
    assert chart.attributes["role"] == "img"
    assert (
        "least 0, median 45, most 200; 2 of 8 with fewer than 32"
        in (chart.attributes["aria-label"])
    )
    few = chart.one("path", class_="few").attributes["d"]
    assert re.findall(r"M(\d+) ", few) == ["3", "4"]
    assert "v-0" not in few  # none is not seen
    # As the script finds places: the middle of expert 5's bar is row 1, column 5.
    x, w = (float(chart.attributes[f"data-{name}"]) for name in "xw")
    assert chart.attributes["data-row"] == "1"
    width = float(chart.attributes["width"])
    assert int((width * 5.5 / 8 - x) // w) == 5
    assert chart.one("g").attributes["transform"] == f"scale({w} 0.12)"  # of 200 to 24 pixels


NAN = [[math.nan] * 2] * 8


@pytest.mark.parametrize(
    "report",
    [
        calibrated(replace(layer(0), calibration=ExpertStats([0] * 8, ["mse"] * 8, NAN, NAN))),
        calibrated(replace(layer(0, errors=[]), calibration=ExpertStats([], [], [], []))),
        calibrated(replace(layer(0), calibration=given(FINDINGS, before=[[0.0, math.inf]] * 8))),
        calibrated(replace(layer(0), calibration=given(FINDINGS, after=[[0.0, math.inf]] * 8))),
        calibrated(replace(layer(0, projections=("up", "down"), errors=[(0.1, 0.1)] * 8),
                           calibration=given(FINDINGS))),
        calibrated(layer(0), replace(layer(1), calibration=given(FINDINGS))),
        calibrated(),
    ],
)  # fmt: skip
def test_odd_calibrations_have_a_page_too(report: RunReport) -> None:
    root = parse(report)
    assert "nan" not in root.one("main").text
    assert "nan" not in render(report).partition("<main>")[2].partition("<script>")[0]
    ids = [e.attributes["id"] for e in root.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))


def test_experts_without_any_token() -> None:
    root = parse(
        calibrated(replace(layer(0), calibration=ExpertStats([0] * 8, ["mse"] * 8, NAN, NAN)))
    )
    tokens, errors, rules = columns(nth(0, root).one("summary"))
    assert tokens == "0 0 08 below 32"
    assert errors == f"gate, up {DASH}down {DASH}"
    assert rules == "8 mse"
    assert listed(nth(0, root))["no output"] == "8 experts: 0, 1, 2, 3, 4, 5, 6, 7"
    assert heights(nth(0, root)) == [0] * 8


def test_a_minimax_m3_stays_small() -> None:
    rng = np.random.default_rng(0)
    layers = []
    for number in range(3, 60):
        tokens = rng.lognormal(8, 1.5, 128).astype(int).tolist()
        errors = rng.normal(0.09, 0.002, (128, 2)).tolist()
        found = ExpertStats(tokens, ["descent"] * 128, errors, errors)
        layers.append(replace(layer(number, experts=128), calibration=found))
    assert len(render(calibrated(*layers)).encode()) < 2_000_000


class Stopped(BaseException):
    """As a kill would."""


def test_a_run_says_what_was_staged_and_the_same_when_resumed(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = torch.randint(0, 2000, (2, 64), generator=torch.Generator().manual_seed(3))
    settings = Calibration("a <text>", 2, 64, digest_of(rows), "gptq")
    options = Options(include=("*.layers.[12].*",), calibration=settings)
    found: list[Findings] = []

    def seen(checkpoint: Any, steps: Any, record: Any, *more: Any) -> RunReport:
        found[:] = [Staged(record.calibration).findings(group) for group in steps.groups]
        return results.collect(checkpoint, steps, record, *more)

    def stop(done: float, layers: int, _: str) -> None:
        if done >= 2.5:
            raise Stopped

    monkeypatch.setattr(execute, "collect", seen)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Checkpoint(trained) as checkpoint:
            steps = plan(checkpoint, options)
            whole, again = tmp_path / "a" / "out", tmp_path / "b" / "out"
            execute.execute(checkpoint, steps, whole, samples=rows)
            with pytest.raises(Stopped):
                execute.execute(checkpoint, steps, again, samples=rows, calibrating=stop)
            execute.execute(checkpoint, steps, again, samples=rows, resume=True)
    finally:
        torch.set_num_threads(threads)
    for name in (REPORT, REPORT_DATA):
        assert (whole / name).read_bytes() == (again / name).read_bytes()
    written = loads((whole / REPORT_DATA).read_bytes())
    assert render(written) == (whole / REPORT).read_text(encoding="utf-8")
    assert written.calibration == CalibrationReport(
        "a <text>", 2, 64, "gptq", False, MIN_TOKENS, "max", digest_of(rows)
    )
    for layer_, findings in zip(written.layers, found, strict=True):
        assert layer_.calibration is not None
        assert layer_.calibration.tokens == findings.tokens
        assert layer_.calibration.rules == findings.rules
        for name in ("before", "after"):
            known = np.array(getattr(layer_.calibration, name))
            assert np.array_equal(np.isnan(known), np.isnan(getattr(findings, name)))
            assert np.nan_to_num(known) == pytest.approx(
                np.nan_to_num(getattr(findings, name)), rel=1e-5
            )

    root = Tree((whole / REPORT).read_text(encoding="utf-8").rpartition("<!--")[0]).root
    assert f"gptq, 2 {TIMES} 64 tokens of a <text>" in root.one("header").text
    assert len(found) == 2
    for row, findings in enumerate(found):
        assert nth(row, root).one(class_="name").text == findings.prefix
        few = [str(e) for e, n in enumerate(findings.tokens) if n < MIN_TOKENS]
        tokens, errors, _ = columns(nth(row, root).one("summary"))
        assert tokens.startswith(f"{min(findings.tokens)} ")
        assert tokens.endswith(f" {max(findings.tokens)}{len(few)} below {MIN_TOKENS}")
        lists = listed(nth(row, root))
        assert lists["mse"].partition(": ")[2].split(", ") == few
        assert lists["gptq"].split()[0] == str(len(findings.tokens) - len(few))
        means = [
            float(np.nanmean(errors, axis=0)[product])
            for product in (0, 1)
            for errors in (findings.before, findings.after)
        ]
        numbers = [float(n) for n in re.findall(r"\d\.\d+(?![\d%.])", errors)]
        assert numbers == pytest.approx(means, rel=1e-3)
