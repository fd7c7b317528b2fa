"""The layer benchmark: its arguments, how it measures, and a run of it on this machine's CPU."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import moe_layer
from benchmarks.moe_layer import Clocks, check_outputs, parse
from benchmarks.moe_layer_table import table
from tests.benchmarks.moe_layers import M3, random, run, small
from vllm_nvfp4_moe.doctor.inputs import Batch, apart, batch, plain, random_weights
from vllm_nvfp4_moe.doctor.layer import Layer, WrongKernelError, build
from vllm_nvfp4_moe.doctor.shape import Shape
from vllm_nvfp4_moe.doctor.timing import Pass, time_on_gpu

__all__ = ["small"]  # a fixture


# Arguments, clocks.


def test_arguments() -> None:
    args = parse([])
    assert args.tokens == [2**n for n in range(15)] and args.tp == [1, 2, 4, 8]
    every = ["ours", "fp8", "humming", "marlin", "cutile", "flashinfer-fp8", "bf16"]
    assert args.kernels == every and args.device == "cuda"
    args = parse(["--kernels", "marlin", "ours", "--tp", "4", "--limit", "60", "--skewed"])
    assert args.kernels == ["ours", "marlin"] and args.skewed and args.limit == 60
    for wrong in (["--tokens", "0"], ["--rounds", "1"], ["--shapes", "gpt"], ["--tp", "3"]):
        with pytest.raises(SystemExit):
            parse(wrong)


def test_clocks_count_only_while_kernels_are_timed() -> None:
    clocks = Clocks(torch.device("cpu"))
    clocks.samples = [(1.0, 345, 2619), (2.0, 1980, 3201), (2.5, 1700, 3201), (4.0, 345, 2619)]
    clocks.busy = [(1.5, 3.0)]
    assert clocks.during() == {"sm": [1700, 1840, 1980], "mem": [3201, 3201, 3201]}
    assert clocks.during() == {}


def test_what_nvidia_smi_says_is_read() -> None:
    clocks = Clocks(torch.device("cpu"))
    lines = ["2026/11/23 22:54:46.125, 1980, 3201\n", "2026/11/23 22:54:46.225, [N/A], 3201\n"]
    clocks.process = type("Process", (), {"stdout": lines})  # type: ignore[assignment]
    clocks._read()
    assert [sample[1:] for sample in clocks.samples] == [(1980, 3201)]
    assert clocks.samples[0][0] % 1 == pytest.approx(0.125)


# The measuring path: CUDA's part with stand-ins, the rest on this machine's CPU.


def test_events_and_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels take turns; each is between its own two events, and replays its own graph."""
    done: list[str] = []

    class Event:
        def __init__(self, timed: bool) -> None:
            assert timed

        def record(self) -> None:
            self.place = len(done)
            done.append("event")

        def elapsed_time(self, end: Event) -> float:
            return float(end.place - self.place)

    class Graph:
        def replay(self) -> None:
            done.append("replay")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    x = type("Tensor", (), {"is_cuda": True, "clone": lambda self: self})()
    layer: Any = lambda given: done.append("call") or given.x  # noqa: E731
    given = [Batch(x, x, x)] * 8
    one = Pass(layer, given)
    one.capture()
    assert done == ["call"] * 16
    assert one.last() is x and done.pop() == "replay"
    done.clear()
    times = time_on_gpu({"a": one, "b": lambda: done.extend("xyz")}, 3)
    assert times == {"a": [2.0] * 3, "b": [4.0] * 3}
    assert done[:8] == ["event", "replay", "event", "event", "x", "y", "z", "event"]
    assert done.count("wait") == 1 and done[-1] == "wait"


def test_fp8_may_be_further_apart_from_any_other() -> None:
    """Also where it is the first, which the others are compared with."""
    x = torch.ones(1, 4)
    given = [Batch(x, x, torch.zeros(1, 1))]

    def problems(**outs: float) -> list[str]:
        layers: Any = {name: lambda given, out=out: x * out for name, out in outs.items()}
        return moe_layer.measure_row(layers, given, 2, Clocks(torch.device("cpu")))[1]

    assert problems(fp8=1.06, marlin=1.0, bf16=1.01) == []
    (problem,) = problems(marlin=1.06, bf16=1.01)
    assert "bf16 and marlin 0.04" in problem


def test_a_run(small: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "results.json"
    assert run("--tokens", "1", "300", "--out", str(file)) == 0
    said = capsys.readouterr().out
    assert "VERDICT all kernels agree" in said and "ours: the CPU kernel" in said
    results = json.loads(file.read_text())
    (shape,) = results["shapes"]
    assert [row["tokens"] for row in shape["rows"]] == [1, 300]
    assert set(shape["errors"]) == {"ours/bf16", "ours/plain", "bf16/plain"}
    assert max(shape["errors"].values()) < 0.01
    for row in shape["rows"]:
        for name, ms in row["ms"].items():
            low, high = row["iqr"][name]
            assert 0 < low <= ms <= high
        assert row["apart"]["bf16"] < 0.01
    assert table(shape, results["about"]) in said


def test_a_kernel_that_is_wrong(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    call = Layer.__call__

    def wrong(self: Layer, given: Batch) -> torch.Tensor:
        out = call(self, given)
        return out * 1.05 if "CpuMethod" in type(self.method).__name__ else out

    monkeypatch.setattr(Layer, "__call__", wrong)
    assert run("--tokens", "2") == 1
    said = capsys.readouterr().out
    assert "WRONG tiny tp1, 32 tokens: ours/bf16 0.05" in said
    assert "WRONG tiny tp1, 2 tokens: bf16 and ours 0.0" in said


def test_another_kernel_than_ours(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As on a GPU for which ours is not chosen: nothing is timed."""
    wanted = moe_layer.WAYS["cuda"]["ours"]
    monkeypatch.setitem(moe_layer.WAYS["cpu"], "ours", wanted)
    assert run("--tokens", "2") == 1
    said = capsys.readouterr().out
    assert "WRONG tiny tp1: ours: WrongKernelError: CpuMethod runs the CPU kernel" in said
    assert "2 tokens:" not in said


def test_the_kernels_name_is_checked_too() -> None:
    def made(method: str, kernel: str) -> Layer:
        own = type(method, (), {"kernel": kernel, "passed_over": ()})()
        experts = type("Experts", (), {"quant_method": own})()
        return Layer(type("Runner", (), {"routed_experts": experts})(), None)

    layer = made("VllmKernelsMethod", "MARLIN (Y)")
    layer.check(moe_layer.WAYS["cuda"]["marlin"])
    eight = made("HopperMethod", "HOPPER FP8 (Z)")
    eight.check(moe_layer.WAYS["cuda"]["fp8"])
    with pytest.raises(WrongKernelError, match="runs HOPPER FP8"):
        eight.check(moe_layer.WAYS["cuda"]["ours"])
    for name in ("humming", "ours"):
        with pytest.raises(WrongKernelError, match="runs MARLIN"):
            layer.check(moe_layer.WAYS["cuda"][name])


def test_one_kernels_failure_hides_nothing(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    call = Layer.__call__

    def failing(self: Layer, given: Batch) -> torch.Tensor:
        if len(given.x) == 4 and "Unquantized" in type(self.method).__name__:
            raise RuntimeError("out of memory")
        return call(self, given)

    monkeypatch.setattr(Layer, "__call__", failing)
    assert run("--tokens", "4", "8") == 1
    said = capsys.readouterr().out
    assert "WRONG tiny tp1, 4 tokens: bf16: RuntimeError: out of memory" in said
    assert "4 tokens: ours" in said and "8 tokens: ours" in said


def test_a_limit_stops_cleanly(small: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "results.json"
    assert run("--tokens", "1", "--limit", "0", "--out", str(file)) == 0
    assert "stopped by --limit" in capsys.readouterr().out
    assert json.loads(file.read_text())["shapes"] == []


def test_minimax_m3s_gate_goes_through_the_layer(tmp_path: Path) -> None:
    """On CPUs vLLM's bf16 layer does not apply it; ours against plain arithmetic."""
    shape = Shape("m3", 16, 256, 128, 4, M3.gate)
    w13, w2 = random_weights(shape, random())
    with moe_layer.one_rank(torch.device("cpu")):
        layers = {"ours": build(shape, w13, w2, moe_layer.WAYS["cpu"]["ours"])}
    given = batch(shape, 32, True, random())
    errors, problems = check_outputs(shape, w13, w2, layers, given)
    assert problems == [] and errors["ours/plain"] < 0.01
    silu = plain(Shape("silu", 16, 256, 128, 4), w13, w2, given)
    assert apart(layers["ours"](given), silu) > 0.1
