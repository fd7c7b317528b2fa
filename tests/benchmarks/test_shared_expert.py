"""A shared expert beside routed ones: what it computes, on which stream, and its table."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import moe_layer
from benchmarks.moe_layer_table import beside_table, report
from benchmarks.shared_expert import STREAMED, Beside, SharedExpert
from quantize.experts.gates import Gate
from tests.benchmarks.moe_layers import ABOUT, GOOD, TINY, random, run, saved, small
from vllm_nvfp4_moe.doctor.inputs import Batch, apart, batch
from vllm_nvfp4_moe.doctor.shape import Shape

__all__ = ["small"]  # a fixture


@pytest.mark.parametrize("gate", [TINY.gate, Gate("relu2")], ids=str)
def test_what_it_computes(gate: Gate) -> None:
    shape = Shape("x", 4, 64, 48, 1, gate)
    shared = SharedExpert(shape, random())
    given = batch(shape, 8, False, random(1))
    both = given.x.float() @ shared.first.float().T
    assert both.shape == (8, 96 if gate.gated else 48)
    inner = gate.apply(*both.chunk(2, 1)) if gate.gated else gate.apply(both)
    assert apart(shared(given), inner @ shared.second.float().T) < 0.02


@pytest.mark.parametrize("tokens", [1, STREAMED, STREAMED + 1])
def test_the_second_stream(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's order (``SharedExperts.maybe_forward_async``): it waits for what came before, and
    what is added waits for it. Beyond 256 tokens there is one stream."""
    done: list[str] = []
    here = ["main"]

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            done.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream: Stream) -> Any:
        here.append(stream.name)
        yield
        here.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Stream(here[-1]))
    monkeypatch.setattr(torch.cuda, "stream", on)
    shared: Any = lambda given: done.append(f"shared on {here[-1]}") or given.x  # noqa: E731
    shared.stream = Stream("second")
    layer: Any = lambda given: done.append(f"routed on {here[-1]}") or 2 * given.x  # noqa: E731
    x = torch.ones(tokens, 4)
    assert torch.equal(Beside(layer, shared)(Batch(x, x, x)), 3 * x)
    expected = ["shared on main", "routed on main"]
    if tokens <= STREAMED:
        expected = ["second waits for main", "shared on second", "routed on main"]
        expected.append("main waits for second")
    assert done == expected


def beside() -> dict[str, Any]:
    """``GOOD`` at 16 tokens beside a shared expert that takes 0.1 ms."""
    results = saved({16: GOOD[16]})
    results["rows"][0] |= {"shared": 0.1, "beside": {"ours": 0.6, "humming": 0.9, "bf16": 2.1}}
    return results


def test_the_table() -> None:
    lines = beside_table(beside()).splitlines()
    assert lines[0].split(" | ")[1:3] == ["shared expert alone", "ours"]
    assert lines[2] == "| 16 | 0.100 | 0.600 | 0.900 | 2.100 | 1.50 | 0.20 |"
    results = beside()
    results["rows"][0]["beside"]["fp8"] = 0.3
    assert beside_table(results).splitlines()[2].endswith("| 1.50 | 0.20 |")
    del results["rows"][0]["beside"]["ours"]
    assert beside_table(results).splitlines()[2].endswith("| - | - |")


def test_a_report_has_it_where_it_was_measured() -> None:
    run = {"about": ABOUT, "shapes": [beside()], "problems": []}
    assert beside_table(beside()) in report(run)
    assert "shared expert" not in report(run | {"shapes": [saved(GOOD)]})


def test_a_run(small: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "results.json"
    assert run("--tokens", "1", "300", "--shared-expert", "--out", str(file)) == 0
    (shape,) = json.loads(file.read_text())["shapes"]
    for row in shape["rows"]:
        assert row["shared"] > 0 and set(row["beside"]) == set(row["ms"]) == {"ours", "bf16"}
    assert beside_table(shape) in capsys.readouterr().out


def test_a_layer_that_goes_wrong_beside_it(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As one that writes over memory which the other stream still reads."""
    call = Beside.__call__

    def wrong(self: Beside, given: Batch) -> torch.Tensor:
        out = call(self, given)
        return out * 1.2 if "Cpu" in type(self.layer.method).__name__ else out

    monkeypatch.setattr(Beside, "__call__", wrong)
    assert run("--tokens", "2", "--shared-expert") == 1
    said = capsys.readouterr().out
    assert "2 tokens: beside a shared expert: bf16 and ours 0.1" in said


def test_it_is_not_timed_unasked() -> None:
    assert not moe_layer.parse([]).shared_expert and moe_layer.parse(["--shared-expert"])
