"""The list of what is peculiar to a vLLM version."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from vllm_nvfp4_moe import quirks, versions


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(quirks.logger, "info_once", lambda text, *args: found.append(text % args))
    return found


def test_the_list_is_whole() -> None:
    named = {name: q for name, q in vars(quirks).items() if isinstance(q, quirks.Quirk)}
    assert list(named.values()) == list(quirks.QUIRKS)
    supported = {f"{major}.{minor}" for major, minor in versions.SUPPORTED}
    assert all(quirk.seen_in and set(quirk.seen_in) <= supported for quirk in quirks.QUIRKS)
    assert len({quirk.name for quirk in quirks.QUIRKS}) == len(quirks.QUIRKS)
    # Each is logged where the plugin acts on it.
    source = "".join(f.read_text() for f in (ROOT / "vllm_nvfp4_moe").rglob("*.py"))
    assert set(re.findall(r"\b([A-Z0-9_]+)\.log\(\)", source)) == set(named)


def test_what_is_acted_on_is_logged(
    load: Callable[..., dict[str, Any]], shallow: dict[str, Path], lines: list[str]
) -> None:
    """A MiniMax-M3 on a CPU: the router, and nothing else."""
    load(shallow["modelopt"])
    version = versions.installed_version()
    routing = quirks.GROUPED_ROUTING
    seen_in = ", ".join(routing.seen_in)
    said = f"Acting on a quirk of vLLM {version} (seen in {seen_in}): {routing.name}"
    assert lines == [said]
