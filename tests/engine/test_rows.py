"""What ``every_family`` makes of what engines said, without any engine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.every_family import Run
from tests.engine.forks import Outcome
from tests.support_page import served

RIGHT, FAULT = [-1.0, -2.0], 0.5


def said(off: float) -> Outcome:
    """An engine's log-probabilities, each ``off`` of what Transformers says."""
    return Outcome([value + off for value in RIGHT], None, 1.0)


FAILED = Outcome(None, "ValueError: no", 1.0)


@pytest.mark.parametrize(
    ("ours", "stock", "transformers", "result", "words"),
    [
        # As Transformers: nothing else is run.
        (said(1e-6), None, None, "same", "same: 1e-06"),
        # Off as vLLM is without the package.
        (said(0.01), said(0.01), None, "same", "same, as vLLM: 1e-02"),
        # vLLM's class is wrong, and its Transformers backend right.
        (
            said(0.4), said(0.4), said(1e-6), "same",
            "same, Transformers backend: 1e-06; not vLLM's default: its log-probabilities are 0.4 "
            "off; a fault in the experts makes 0.5",
        ),
        (FAILED, FAILED, FAILED, "vllm", "vLLM does not run it unquantized either: ValueError: no"),
        (said(0.4), said(0.4), said(0.4), "vllm", "vLLM itself differs, unquantized"),
        # What is to be mended, whatever else is right.
        (FAILED, said(1e-6), said(1e-6), "ours", "this package does not: ValueError: no"),
        (said(0.4), said(1e-6), FAILED, "ours", "mended: its log-probabilities are 0.4 off"),
        # Without the package it does not run, and so nothing excuses a difference.
        (said(0.01), FAILED, FAILED, "ours", "mended: its log-probabilities are 0.01 off"),
    ],
)  # fmt: skip
def test_the_row_of_a_family(
    tmp_path: Path, ours: Outcome, stock: Outcome | None, transformers: Outcome | None,
    result: str, words: str,
) -> None:  # fmt: skip
    folder = tmp_path / "toy"
    folder.mkdir()
    for name, off in (("source", 0.0), ("right", 0.0), ("wrong", FAULT)):
        (folder / f"{name}.json").write_text(json.dumps([value + off for value in RIGHT]))
    args = argparse.Namespace(device="cpu", workers=1, limit=1, wrong_gate=False)
    state = Run(tmp_path, args)
    state.made = {"toy": Outcome({"gate": "silu", "fault": "SiLU"}, None, 1.0)}
    state.ours = {"toy": ours}
    if stock is not None:
        state.stock = {"toy": stock}
    if transformers is not None:
        state.ours["toy@transformers"] = transformers
        if not state.same("toy@transformers"):
            state.stock["toy@transformers"] = FAILED if transformers.error else said(0.4)
    row: dict[str, Any] = state.row("toy")
    assert row["result"] == result
    assert words in served(row, "")


@pytest.mark.parametrize(
    ("device", "key", "result"),
    [
        ("cpu", "toy", False),
        ("cuda", "toy", True),
        # In bfloat16 on CPUs too.
        ("cpu", "glm5_next", True),
        ("cpu", "glm5_next.text@transformers", True),
    ],
)
def test_how_much_is_the_same(tmp_path: Path, device: str, key: str, result: bool) -> None:
    """A tenth of what a fault makes is, where the engine computes in bfloat16."""
    folder = tmp_path / key.partition("@")[0]
    folder.mkdir()
    for name, off in (("right", 0.0), ("wrong", FAULT)):
        (folder / f"{name}.json").write_text(json.dumps([value + off for value in RIGHT]))
    state = Run(tmp_path, argparse.Namespace(device=device, workers=1, limit=1, wrong_gate=False))
    state.ours = {key: said(FAULT / 10)}
    assert state.same(key) == result
