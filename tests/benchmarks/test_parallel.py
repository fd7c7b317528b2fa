"""What the parallel benchmark takes for one model split differently, and what not."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import parallel
from benchmarks.parallel import RANDOM, compare, judge
from examples import server

ONE = {
    "folder": "nano", "way": "one", "perplexities": [6.0], "scores": [[-1.0, -3.0, 0.0, -2.0]],
    "rearranged": 0,
}  # fmt: skip


def line(**more: Any) -> dict[str, Any]:
    return ONE | {"way": "ep2"} | more


def test_the_distance_is_relative_to_the_spread_of_scores() -> None:
    moved = line(scores=[[-1.5, -3.5, -0.5, -2.5], [-1.0, -3.0, 0.0, -2.0]])
    assert compare(moved, ONE) == pytest.approx([0.5 / 1.25**0.5, 0.0])


def test_equal_and_slightly_different_ones_pass() -> None:
    assert judge(line(), ONE) == []
    assert judge(line(perplexities=[6.005], scores=[[-1.01, -3.0, 0.0, -2.0]]), ONE) == []


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"perplexities": [6.1]}, "perplexity 6.1, on one GPU 6.0"),
        ({"perplexities": [float("nan")]}, "perplexity nan"),
        ({"perplexities": [6.0, 6.2], "scores": ONE["scores"] * 2}, "perplexity 6.2"),
        ({"scores": [[-3.0, -1.0, -2.0, 0.0]]}, "apart"),
        ({"scores": [[float("nan")] * 4]}, "apart"),
        ({"way": "eplb"}, "no expert was moved"),
        ({"way": "eplb", "rearranged": -1}, "no expert was moved"),
    ],
)
def test_anything_else_is_wrong(more: dict[str, Any], said: str) -> None:
    problems = judge(line(**more), ONE)
    assert len(problems) == 1 and said in problems[0], problems


def test_a_random_models_perplexity_says_nothing() -> None:
    single = ONE | {"folder": RANDOM}
    assert judge(line(folder=RANDOM, perplexities=[9.0]), single) == []


def test_without_one_gpu_there_is_nothing_to_compare_with() -> None:
    assert judge(line(), None) == ["nano, ep2: there is no figure of one GPU"]


def test_all_at_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Three servers are up beside each other; one that fails hides nothing of the others."""
    together = threading.Barrier(3, timeout=60)

    def measure(folder: Path, way: str, *_: Any) -> dict[str, Any]:
        together.wait()
        if way == "tp2":
            raise RuntimeError("no second GPU")
        return ONE | {"folder": folder.name, "way": way}

    monkeypatch.setattr(parallel, "measure", measure)
    command = ["parallel", str(trained), "--ways", "one", "tp2", "ep2", "--at-once"]
    monkeypatch.setattr(sys, "argv", [*command, "--rows", "1", "--logs", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        parallel.main()
    assert stopped.value.code == 1
    said = capsys.readouterr().out
    assert said.count("RESULT") == 2
    assert "tp2: RuntimeError: no second GPU" in said


def test_a_server_is_stopped_from_any_thread() -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with ThreadPoolExecutor(1) as pool:
        process = subprocess.Popen(command, start_new_session=True)
        pool.submit(server.stop, process).result(timeout=60)
    assert process.returncode is not None
