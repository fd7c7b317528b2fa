"""docs/users/support.md is current, and the tests that it names are there."""

from __future__ import annotations

import subprocess
import sys

from tests import support_page
from tests.conftest import ROOT
from tests.plugin.test_blackwell_selection import CLAMPED_SILU, GATES
from tests.quantize.families import classes, missing


def test_the_page_is_current() -> None:
    """If this fails: python -m tests.support_page"""
    assert support_page.FILE.read_text(encoding="utf-8") == support_page.page()


def test_the_gates_it_speaks_of() -> None:
    assert set(map(str, GATES)) >= support_page.CHOSEN
    assert str(CLAMPED_SILU) == support_page.CLAMPED


def test_the_tests_that_it_names_are_there() -> None:
    """pytest finds each. Those of classes that are not installed yet it cannot."""
    later = {family.folder for family in support_page.table() if family.name in missing()}
    assert not later & set(classes().values())
    names = [
        name
        for name in support_page.names()
        if not any(f"[{folder}]" in name or f"[{folder}-" in name for folder in later)
    ]
    assert len(names) > 150
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *names],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_results_say_all_of_themselves() -> None:
    """A row for each family that engines were tried with, of one platform at most once."""
    rows = support_page.results()
    assert len({(row["platform"], row["family"]) for row in rows}) == len(rows)
    folders = {family.folder for family in support_page.table()}
    for row in rows:
        assert row["family"] in folders
        assert row["platform"] in ("CPU", "H200")
        assert row["result"] in ("same", "vllm", "transformers", "ours")
        assert row["vllm"] and row["transformers"] and row["date"]
        assert row["result"] == "same" or row["reason"]
