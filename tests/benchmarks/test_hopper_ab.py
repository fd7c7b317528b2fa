"""The A/B of Hopper sources: what it must not call equal. Its comparison needs a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import hopper_ab

HOPPER = Path(hopper_ab.__file__).parents[1] / "vllm_nvfp4_moe/kernels/hopper"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """No compiler and no GPU: the sources that would have been compiled."""
    sources: list[str] = []

    def load(source: str, *_: Any) -> None:
        sources.append(source)

    monkeypatch.setattr(hopper_ab.jit, "load", load)
    monkeypatch.setattr(hopper_ab, "loaded", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "no GPU")
    return sources


def asked(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["hopper_ab", *map(str, words)])
    return hopper_ab.main()


def test_directories_of_one_name_are_not_one_version(
    monkeypatch: pytest.MonkeyPatch,
    compiled: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """As those of two checkouts are: one would be compared with nothing, and called equal."""
    folders = [tmp_path / checkout / "hopper" for checkout in ("one", "other")]
    for folder in folders:
        folder.parent.mkdir()
        folder.symlink_to(HOPPER)
    with pytest.raises(SystemExit) as ended:
        asked(monkeypatch, *folders, "--build")
    assert ended.value.code == 2 and not compiled
    assert "two are alike: ['hopper', 'hopper']" in capsys.readouterr().err


def test_what_was_not_compared_is_not_equal(
    monkeypatch: pytest.MonkeyPatch, compiled: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert asked(monkeypatch, HOPPER, "--kernels", "bf16", "--limit", "0") == 1
    said = capsys.readouterr().out
    assert len(compiled) == 1 and "nothing was compared" in said and "equal" not in said
