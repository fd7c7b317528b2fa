"""How many stages the Hopper kernels' ring may have where warpgroups take turns at them.

A stage's barrier has a parity: of two rounds it says which it is. A group that did not have a
stage's last round may find that round's copy still on its way, and take the parity for its own.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.gpu.layer import Shape, error
from tests.gpu.packed import BOUND, GATES, Packed
from tests.plugin.emulation import CPU, Emulated, body, build
from vllm_nvfp4_moe.kernels.hopper.bf16 import TOKENS_8
from vllm_nvfp4_moe.kernels.hopper.registry import KERNELS

KERNEL = KERNELS["bf16"]
LONG = Shape("long", 4, 2048, 64, 2)
"""16 stages of columns: the ring goes round a few times in a tile."""


def with_stages(most: int) -> str:
    """The source with a ring of ``most`` stages at most."""
    source, times = re.subn(
        r"< 24 \? BUDGET / STAGE_BYTES : 24",
        f"< {most} ? BUDGET / STAGE_BYTES : {most}",
        body(KERNEL),
    )
    assert times == 1
    return source


def said(folder: Path, source: str, patch: pytest.MonkeyPatch) -> list[str]:
    """What was wrong with each seed; or nothing."""
    emulated = Emulated(build(folder, source, KERNEL), KERNEL, patch)
    packed = Packed.random(LONG, CPU)
    x, ids, weights = packed.batch(3)
    truth = packed.truth(x, ids, weights)
    found = []
    for seed in range(1, 5):
        try:
            out = emulated.run(
                x, packed.experts, ids, weights, GATES["silu"], tile_shape=TOKENS_8, seed=seed
            )
        except AssertionError as wrong:
            found.append(str(wrong))
        else:
            found.append("" if error(out, truth).whole < BOUND else "wrong output")
    return found


def test_a_stage_is_the_same_groups_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "four").mkdir()
    assert set(said(tmp_path / "four", with_stages(4), monkeypatch)) == {""}
    with pytest.raises(subprocess.CalledProcessError):
        build(tmp_path, with_stages(5), KERNEL)
    assert "a stage would be another group's each time" in capfd.readouterr().err
    allowed = re.sub(r"static_assert\(STAGES % K_GROUPS.*\n", "", with_stages(5))
    assert "one arrival too many" in "".join(said(tmp_path, allowed, monkeypatch))
