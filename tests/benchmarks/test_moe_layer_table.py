"""The layer benchmark's tables, and which goals they say are met."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.moe_layer_table import Row, report, summary, table
from tests.benchmarks.moe_layers import ABOUT, GOOD, M3, saved
from tests.conftest import ROOT
from vllm_nvfp4_moe.doctor.shape import Floor


def test_the_table() -> None:
    lines = table(saved(GOOD), ABOUT).splitlines()
    assert lines[0].split(" | ")[2:5] == ["ours", "Humming", "bf16 Triton"]
    assert lines[2] == "| 1 | 4 | 0.0500 | 0.0750 | 0.100 | 0.0296 | memory | 1.50 | 0.59 |"
    assert lines[5] == "| 8192 | 128 | 6.500 | 9.750 | 9.800 | 4.697 | FLOPs | 1.50 | 0.72 |"
    assert {line.count("|") for line in lines} == {10}


def with_fp8(ms: float) -> dict[str, Any]:
    """``GOOD`` and our kernel with FP8 activations at 8192 tokens."""
    results = saved(GOOD)
    results["kernels"]["fp8"] = "Hopper FP8"
    results["rows"][3]["ms"]["fp8"] = ms
    return results


def test_fp8_activations_are_beside_and_no_rival() -> None:
    """Even where it is the fastest, ours is compared with what others do in bf16."""
    results = with_fp8(4.0)
    lines = table(results, ABOUT).splitlines()
    assert lines[0].split(" | ")[2:4] == ["ours", "ours, FP8"] and "| ours / FP8 |" in lines[0]
    last = "| 8192 | 128 | 6.500 | 4.000 | 9.750 | 9.800 | 4.697 | FLOPs | 1.50 | 0.72 | 1.62 |"
    assert lines[5] == last and lines[2].endswith("| 1.50 | 0.59 | - |")
    assert summary(results, ABOUT)[-1] == "GOAL holds: ours / FP8 at 8192 1.625, at least 1.50"
    assert summary(with_fp8(4.5), ABOUT)[-1].startswith("GOAL MISSED: ours / FP8")
    assert summary(results, ABOUT)[:-1] == summary(saved(GOOD), ABOUT)


def test_what_was_not_timed_is_a_dash() -> None:
    results = saved(GOOD)
    del results["rows"][0]["ms"]["ours"]
    del results["rows"][1]["ms"]["humming"]
    lines = table(results, ABOUT).splitlines()
    assert lines[2] == "| 1 | 4 | - | 0.0750 | 0.100 | 0.0296 | memory | - | - |"
    assert lines[3].split(" | ")[3] == "-" and "3.45" in lines[3]


def test_all_goals_hold() -> None:
    first, *goals = summary(saved(GOOD), ABOUT)
    assert first == (
        "best other / ours: geometric mean 1.500 of 4 token counts, smallest 1.500 at 1"
    )
    assert len(goals) == 4 and all(line.startswith("GOAL holds") for line in goals)


@pytest.mark.parametrize(
    ("tokens", "times", "missed"),
    [
        (1, (0.08, 0.075, 0.1), "smallest of best other / ours"),
        (8192, (6.8, 9.75, 9.8), "FLOP floor"),
        (64, (1.3, 2.6, 4.0), "memory floor"),
        (4, (1.0, 1.0, 1.0), None),  # 1.38 on average, still
        (2, (1.0, 1.2, 0.9), "smallest of best other / ours"),
    ],
)
def test_a_goal_is_missed(
    tokens: int, times: tuple[float, float, float], missed: str | None
) -> None:
    goals = summary(saved(GOOD | {tokens: times}), ABOUT)[1:]
    found = [line for line in goals if not line.startswith("GOAL holds")]
    assert len(found) == (missed is not None)
    assert not missed or (missed in found[0] and found[0].startswith("GOAL MISSED"))


def test_goals_that_were_not_measured_do_not_hold() -> None:
    goals = summary(saved({1: (0.05, 0.075, 0.1)}), ABOUT)[1:]
    assert sum(line.startswith("GOAL not measured") for line in goals) == 2
    results = saved(GOOD)
    del results["rows"][1]["ms"]["ours"]  # one of 16 to 256
    assert any("not measured: smallest memory" in line for line in summary(results, ABOUT))


def test_goals_are_the_whole_m3s_with_even_routing() -> None:
    assert len(summary(saved(GOOD, M3.slice(2)), ABOUT)) == 1
    assert len(summary(saved(GOOD), ABOUT | {"routing": "skewed"})) == 1
    assert summary(saved({}), ABOUT) == []


def test_a_slower_memory_gives_another_verdict() -> None:
    row = Row(M3, saved(GOOD)["rows"][2], ABOUT | {"bandwidth": 4.0})
    assert row.floor == Floor(pytest.approx(1.0192, abs=1e-4), pytest.approx(0.1468, abs=1e-4))
    assert row.reached(row.floor.memory) == pytest.approx(1.0192 / 1.1, abs=1e-3)


def test_a_saved_run_is_printed_without_vllm(tmp_path: Path) -> None:
    run = {"about": ABOUT, "shapes": [saved(GOOD)], "problems": ["x: 0.5 apart"]}
    file = tmp_path / "results.json"
    file.write_text(json.dumps(run))
    code = (
        "import sys; from benchmarks.moe_layer import main\n"
        f"main(['--table', {str(file)!r}]); assert 'vllm' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == report(run).strip()
    for said in ("### minimax-m3", "Humming: HUMMING (X)", "- GOAL holds", "WRONG x: 0.5 apart"):
        assert said in done.stdout
