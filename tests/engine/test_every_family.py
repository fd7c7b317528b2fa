"""Tiny models of a few families in engines, and the table of all that were run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.engine


def run(out: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """The rows that ``every_family`` writes, by family."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.every_family", str(out), *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert out.exists(), done.stderr[-3000:]
    rows = {row["family"]: row for row in json.loads(out.read_text())}
    assert done.returncode == any(row["result"] == "ours" for row in rows.values())
    return rows


def test_a_few(tmp_path: Path) -> None:
    """One of vLLM's own classes, and one that its Transformers backend runs with another gate."""
    rows = run(tmp_path / "rows.json", "qwen3_moe", "minimax_m3_vl")
    assert {family: row["result"] for family, row in rows.items()} == dict.fromkeys(rows, "same")
    assert len(rows) == 2
    assert all(row["difference"] < 1e-4 for row in rows.values())
    assert all(row["fault_difference"] > 0.1 for row in rows.values())


def test_a_wrong_gate_is_seen(tmp_path: Path) -> None:
    rows = run(tmp_path / "rows.json", "gpt_oss", "--wrong-gate")
    row = rows["gpt_oss"]
    assert row["result"] == "ours"
    assert row["difference"] > 0.5 * row["fault_difference"]
