"""``verify`` finds every single damage that can be seen: 2,400 random ones, and what cannot be.

Each example takes a good checkpoint, damages one thing, and asks ``verify``. The oracle is that the
damaged thing differs from what was there. What then may go unseen is in ``UNSEEN``, which
docs/users/verifying.md repeats; whether an example is of that kind is decided here by plain numpy,
and never by ``verify``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantize.checkpoint.reader import Checkpoint
from quantize.verify import verify
from tests.conftest import ROOT
from tests.quantize.damages import (
    VARIANTS,
    Good,
    damaged,
    following,
    good_checkpoints,
    problems,
)
from tests.quantize.random_damages import damages

UNSEEN = {
    "calibrated code": "a calibrated weight's code that leaves the weight's error as it was",
    "calibrated input scale": "an input scale of `down` from a text that stays plausible",
}
"""What cannot be seen in principle, of single damages."""

UNSEEN_TOGETHER = {
    "selection": "patterns of `made` that select the same modules",
    "harmless ignore entry": "an ignore entry that names a module which is not quantized",
    "report": "the report's `source`, `target`, `command`, `fingerprint`",
    "text": "what it says of a text and of what experts made of it",
}
"""What cannot be seen if who changes it changes the report and its page alike."""

SHARED = ("finding experts", "reading stored formats", "splitting gate and up", "the gate")
"""What ``verify`` shares with the quantizer: a fault there is the same on both sides."""

RANDOM = int(os.environ.get("FUZZ", "0"))
EXAMPLES = 400


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Good]]:
    with good_checkpoints(tmp_path_factory.mktemp("good")) as get:
        yield get


@pytest.mark.parametrize("name", VARIANTS)
def test_a_good_checkpoint_has_no_problems(name: str, good: Callable[[str], Good]) -> None:
    assert problems(good(name)) == []
    with Checkpoint(good(name).folder, decode=False) as target:
        assert verify(None, target).problems == []


def names_a_file(problem: str, folder: Path) -> bool:
    """Or the folder, of what is missing."""
    return re.search(r"\w\.(safetensors|json|html|jinja)\b", problem) is not None or (
        f"{folder}" in problem
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_damage_that_can_be_seen_is_found(name: str, good: Callable[[str], Good]) -> None:
    whole = good(name)
    seen = {"found": 0, "unseen": 0}

    @settings(
        max_examples=RANDOM or EXAMPLES,
        derandomize=not RANDOM,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def one(data: st.DataObject) -> None:
        damage = data.draw(damages(whole))
        with ExitStack() as stack:
            for file, content in following(whole.folder, damage).items():
                stack.enter_context(damaged(whole.folder, file, content))
            found = problems(whole)
        assert all(names_a_file(problem, whole.folder) for problem in found), found
        if damage.unseen is None:
            assert found, damage.what
        else:
            assert damage.unseen in {**UNSEEN, **UNSEEN_TOGETHER}
        seen["found" if found else "unseen"] += 1

    one()
    assert seen["found"] >= 0.9 * EXAMPLES
    assert problems(whole) == []  # mended again


def test_what_cannot_be_seen_is_documented() -> None:
    page = " ".join((ROOT / "docs" / "users" / "verifying.md").read_text().split())
    for what in (*UNSEEN.values(), *UNSEEN_TOGETHER.values(), *SHARED):
        assert what in page
