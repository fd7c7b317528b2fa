"""The layer benchmark: floors, routings, verdicts, and a run of it on this machine's CPU."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import moe_layer
from benchmarks.moe_layer import Clocks, check_outputs, parse
from benchmarks.moe_layer_table import MORE, SHAPES, Row, report, summary, table
from quantize.experts.gates import Gate
from tests.conftest import ROOT
from vllm_nvfp4_moe.doctor.inputs import (
    Batch,
    Stored,
    apart,
    batch,
    batches,
    plain,
    random_biases,
    random_weights,
)
from vllm_nvfp4_moe.doctor.layer import Layer, WrongKernelError, build
from vllm_nvfp4_moe.doctor.shape import Floor, Shape, active_experts, floor
from vllm_nvfp4_moe.doctor.timing import Pass, time_on_gpu

M3 = SHAPES["minimax-m3"]
TINY = Shape("tiny", 16, 256, 128, 4)
ABOUT = {"bandwidth": 4.3, "flops": 790.0, "routing": "uniform"}


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Floors.


@pytest.mark.parametrize(
    ("tokens", "active", "ms", "bound"),
    [(1, 4, 0.0296, "memory"), (256, 128, 0.9481, "memory"), (8192, 128, 4.6972, "FLOPs")],
)
def test_floors_of_minimax_m3(tokens: int, active: int, ms: float, bound: str) -> None:
    found = floor(M3, tokens, active, 4.3, 790)
    assert found.ms == pytest.approx(ms, abs=1e-4) and found.bound == bound


def test_a_slice_has_its_part_of_the_floor() -> None:
    whole, part = (floor(shape, 512, 100, 4.3, 790) for shape in (M3, M3.slice(4)))
    assert part == pytest.approx([bound / 4 for bound in whole])
    assert (M3.slice(8).intermediate, M3.slice(8).tp) == (384, 8)


def test_both_numbers_of_the_floor_are_options() -> None:
    assert floor(M3, 8192, 128, 4.3, 1580).ms == pytest.approx(4.6972 / 2, abs=1e-4)
    assert floor(M3, 1, 4, 2.15, 790).ms == pytest.approx(2 * 0.0296, abs=2e-4)


def test_slices_are_of_whole_blocks() -> None:
    assert all(shape.divides(8) for shape in SHAPES.values())
    for name in ("nemotron-3-nano", "gpt-oss-120b"):
        assert [tp for tp in (1, 2, 4, 8) if MORE[name].divides(tp)] == [1, 2, 4]


def test_experts_without_a_gate_have_two_matrices() -> None:
    nano = MORE["nemotron-3-nano"]
    assert nano.weights == 2 * 2688 * 1856
    assert floor(nano, 1, 6, 4.3, 790).ms == pytest.approx(0.0078, abs=1e-4)


# Routing.


def test_active_experts_are_counted_once() -> None:
    ids = torch.tensor([[3, 1, 7], [7, 3, -1], [0, 1, 3]], dtype=torch.int32)
    assert active_experts(ids) == 4
    assert active_experts(torch.tensor([[2, 5, 9]])) == 3


@pytest.mark.parametrize("skewed", [False, True])
def test_a_tokens_experts_are_distinct(skewed: bool) -> None:
    shape = Shape("router", 128, 32, 16, 8)
    x, weights, ids, _ = batch(shape, 500, skewed, random())
    assert (x.shape, x.dtype) == ((500, 32), torch.bfloat16)
    assert (weights.shape, weights.dtype) == ((500, 8), torch.float32)
    assert (ids.shape, ids.dtype) == ((500, 8), torch.int32) and ids.is_contiguous()
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert int(ids.min()) >= 0 and int(ids.max()) < 128
    assert torch.allclose(weights.sum(1), torch.ones(500))


def test_uniform_routing_is_even_and_skewed_is_not() -> None:
    shape = Shape("router", 128, 16, 16, 4)
    loads = [
        batch(shape, 4096, skewed, random()).ids.long().flatten().bincount(minlength=128)
        for skewed in (False, True)
    ]
    even, uneven = ((load.sort(descending=True).values / 4096).tolist() for load in loads)
    assert even[0] < 1.5 * 4 / 128 and even[-1] > 0.5 * 4 / 128
    # By Zipf's law: nearly half of the tokens want the first (1 / (1 + 1/2 + ...) = 0.18 of draws).
    assert 0.4 < uneven[0] < 0.8 and uneven[-1] < 0.2 * 4 / 128


def test_who_is_popular_differs_from_batch_to_batch() -> None:
    generator = random()
    shape = Shape("router", 128, 16, 16, 1)
    most = {int(batch(shape, 512, True, generator).ids.mode(0).values) for _ in range(6)}
    assert len(most) > 2


def test_small_batches_come_in_several_kinds() -> None:
    assert [batches(n) for n in (1, 256, 512, 2048, 4096)] == [8, 8, 2, 2, 1]


# Weights.


def test_bf16_gets_the_same_weights_exactly() -> None:
    for stored in random_weights(TINY, random()):
        weight = stored.weight(5)
        assert torch.equal(weight.bfloat16().float(), weight) and weight.std() > 0
        assert len(stored.global_scale.unique()) == 3


def test_plain_arithmetic_of_one_expert() -> None:
    """Weights of one, so that every sum is known."""
    shape = Shape("ones", 2, 32, 16, 1)
    one = torch.tensor([1.0, 2.0])

    def ones(rows: int, columns: int) -> Stored:
        codes = torch.full((2, rows, columns // 2), 0x22, dtype=torch.uint8)
        return Stored(codes, torch.ones(2, rows, columns // 16).to(torch.float8_e4m3fn), one)

    given = Batch(torch.full((1, 32), 0.125).bfloat16(), torch.tensor([[0.5]]), torch.tensor([[1]]))
    found = plain(shape, ones(32, 32), ones(32, 16), given)
    pre = 32 * 0.125 * 2
    middle = pre * pre / (1 + 2.718281828**-pre)
    assert torch.allclose(found, torch.full((1, 32), 0.5 * 2 * 16 * middle))


def test_plain_arithmetic_without_a_gate_and_with_biases() -> None:
    """Before the activation, and before the router's weight."""
    shape = Shape("ones", 2, 32, 16, 1, Gate("relu2"), biased=True)
    two = torch.full((2,), 2.0)

    def ones(rows: int, columns: int) -> Stored:
        codes = torch.full((2, rows, columns // 2), 0x22, dtype=torch.uint8)
        return Stored(codes, torch.ones(2, rows, columns // 16).to(torch.float8_e4m3fn), two)

    x = torch.tensor([0.125, -0.125]).repeat_interleave(32).view(2, 32).bfloat16()
    given = Batch(x, torch.full((2, 1), 0.5), torch.tensor([[0], [1]]))
    biases = (torch.tensor([[-3.0], [7.0]]).repeat(1, 16), torch.tensor([[10.0], [4.0]]))
    found = plain(shape, ones(16, 32), ones(32, 16), given, biases)
    assert found[0].tolist() == [0.5 * (16 * 2 * (8 - 3) ** 2 + 10)] * 32
    assert found[1].tolist() == [0.5 * 4] * 32  # 7 - 8 is below zero


def test_biases_are_of_the_sizes_that_they_are_added_to() -> None:
    shape = Shape("biased", 4, 32, 48, 1, Gate("relu2"), biased=True)
    for given, rows in ((shape, 48), (Shape("gated", 4, 32, 48, 1, biased=True), 96)):
        found = random_biases(given, random())
        assert found is not None
        assert [tuple(b.shape) for b in found] == [(4, rows), (4, 32)]
        assert {b.dtype for b in found} == {torch.bfloat16}
    assert random_biases(TINY, random()) is None
    assert random_weights(shape, random())[0].codes.shape == (4, 48, 16)


def test_gates_get_what_matters_to_them() -> None:
    """The clamp at 7 is reached by some of the values, not by most."""
    shape = Shape("m3", 16, 256, 128, 4, M3.gate)
    w13, w2 = random_weights(shape, random())
    given = batch(shape, 32, False, random())
    pre = torch.cat([given.x.float() @ w13.weight(expert).T for expert in range(16)])
    assert 0.01 < float((pre > 7).float().mean()) < 0.2
    assert 0.1 < float(plain(shape, w13, w2, given).std()) < 100


# Tables and verdicts.


def saved(times: Mapping[int, tuple[float, float, float]], shape: Shape = M3) -> dict[str, Any]:
    """A shape's results; ``times``: ours, Humming's and bf16's, by tokens."""
    return {
        "shape": asdict(shape),
        "kernels": {"ours": "Hopper", "humming": "HUMMING (X)", "bf16": "TRITON (Y)"},
        "errors": {},
        "rows": [
            {
                "tokens": tokens,
                "active": min(4.0 * tokens, 128.0),
                "ms": dict(zip(("ours", "humming", "bf16"), each, strict=True)),
                "iqr": {},
                "apart": {},
            }
            for tokens, each in times.items()
        ],
    }


GOOD = {
    1: (0.05, 0.075, 0.1),
    16: (0.58, 0.87, 2.0),
    256: (1.1, 1.65, 4.0),
    8192: (6.5, 9.75, 9.8),
}


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


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(moe_layer.SHAPES, "qwen3-235b", TINY)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")


def run(*more: str) -> int:
    command = ["--device", "cpu", "--shapes", "qwen3-235b", "--kernels", "ours", "bf16"]
    return moe_layer.main([*command, "--rounds", "3", "--tp", "1", *more])


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
