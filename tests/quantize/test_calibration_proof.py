"""A calibrated run compares itself with Transformers' own model first, and stops if they differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.calibration import proof
from quantize.calibration.proof import prove
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan
from tests.quantize import families
from tests.quantize.test_calibration_forward import CPU, FAMILIES, NOT_RUN, rows_of


def proved(
    folder: Path, work: Path, rows: torch.Tensor, method: str = "gptq", **options: Any
) -> str:
    """What a calibration says of its proof."""
    settings = Calibration("text", *rows.shape, "digest", method=method)
    said: list[str] = []
    with Checkpoint(folder) as checkpoint:
        steps = plan(checkpoint, replace(Options(**options), calibration=settings))
        prove(checkpoint, steps, rows, work, CPU, said.append)
    assert not work.exists()
    (line,) = said
    return line


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    def make(family: str) -> Path:
        return families.save(
            families.build(family), family, families.LAYOUTS[0], tmp_path / family
        )

    return make


@pytest.mark.parametrize("family", sorted(FAMILIES - NOT_RUN.keys()))
@pytest.mark.parametrize("alone", [False, True])
def test_every_family_agrees(
    family: str, alone: bool, saved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts loaded together, and one at a time."""
    if alone:
        monkeypatch.setattr("quantize.calibration.reference.WHOLE_LAYER", 0)
    line = proved(saved(family), tmp_path / "proof", rows_of(3, 16), "two-sided")
    assert "2 of 2 layers" in line or "layers, median" in line
