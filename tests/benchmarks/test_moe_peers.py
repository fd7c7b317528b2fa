"""FlashInfer's experts as peers of the layer benchmark: conversions, refusals, how they count."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import flashinfer_cutile, flashinfer_fp8, moe_layer
from benchmarks.absent import AbsentError
from benchmarks.flashinfer_cutile import CuTile, up_above_gate
from benchmarks.flashinfer_fp8 import FusedFp8
from benchmarks.flashinfer_interleave import interleave
from benchmarks.moe_layer_table import MORE, SHAPES, Row
from quantize.experts.gates import Gate
from tests.benchmarks.moe_layers import TINY, random, run, small
from vllm_nvfp4_moe.doctor.inputs import Batch, Stored, batch, plain, random_weights
from vllm_nvfp4_moe.doctor.shape import CLAMPED, SILU, Shape

__all__ = ["small"]  # a fixture

# Conversions.


def as_the_cuda_kernel(weight: torch.Tensor) -> torch.Tensor:
    """``interleave_fp4_fp8_weights_for_sm90_mixed_gemm_kernel`` by thread, on one expert."""
    rows, half = weight.shape
    columns = 2 * half
    source = [int(word) & 0xFFFF for word in weight.contiguous().view(torch.int16).flatten()]
    target = [0] * len(source)
    for block in range(rows // 2):
        for partition in range(columns // 64):
            for lane in range(16):
                row = block // 8 * 16 + block % 8
                to_row = row + lane % 8 // 4 * 8
                to_lane = lane // 8 * 8 + lane % 4 * 2
                one = source[row * columns // 4 + partition * 16 + lane]
                other = source[(row + 8) * columns // 4 + partition * 16 + lane]
                codes = one | other << 16
                moved = codes & 0x77777777
                moved |= (codes & 0x8) << 4 | (codes & 0x80) << 8
                moved |= (codes & 0x800) << 12 | (codes & 0x8000) << 16
                moved |= (codes & 0x80000) >> 16 | (codes & 0x800000) >> 12
                moved |= (codes & 0x8000000) >> 8 | (codes & 0x80000000) >> 4
                place = to_row * columns // 4 + partition * 16 + to_lane
                target[place], target[place + 1] = moved & 0xFFFF, moved >> 16
    numbers = [byte for word in target for byte in (word & 0xFF, word >> 8)]
    return torch.tensor(numbers, dtype=torch.uint8).view(rows, half)


@pytest.mark.parametrize("sizes", [(16, 64), (48, 64), (32, 192)])
def test_the_interleaving_is_that_of_flashinfers_kernel(sizes: tuple[int, int]) -> None:
    rows, columns = sizes
    weight = torch.randint(0, 256, (3, rows, columns // 2), dtype=torch.uint8, generator=random())
    expected = torch.stack([as_the_cuda_kernel(expert) for expert in weight])
    assert torch.equal(interleave(weight, "fp4_fp8"), expected)
    assert not torch.equal(expected, weight)


@pytest.mark.parametrize("sizes", [(8, 64), (16, 32), (24, 96)])
def test_sizes_that_it_would_mix_up_are_refused(sizes: tuple[int, int]) -> None:
    weight = torch.zeros(1, sizes[0], sizes[1] // 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"{sizes[0]} x {sizes[1]}"):
        interleave(weight)
    with pytest.raises(ValueError, match="int4"):
        interleave(torch.zeros(1, 16, 32, dtype=torch.uint8), "int4")


def test_rows_are_in_flashinfers_order() -> None:
    """``MoEWeightPack``: ``act(x @ w1[I:].T) * (x @ w1[:I].T)``, where w1 is given so."""
    w13, w2 = random_weights(TINY, random())
    w1 = up_above_gate(w13)
    given = batch(TINY, 8, False, random())
    rows = TINY.intermediate
    out = torch.zeros(8, TINY.hidden)
    for token in range(8):
        for weight, expert in zip(given.weights[token], given.ids[token].tolist(), strict=True):
            x = given.x[token].float()
            inner = torch.nn.functional.silu(x @ w1.weight(expert)[rows:].T)
            inner = inner * (x @ w1.weight(expert)[:rows].T)
            out[token] += weight * (inner @ w2.weight(expert).T)
    torch.testing.assert_close(out, plain(TINY, w13, w2, given), rtol=1e-4, atol=1e-4)


def flashinfers(name: str, numbers: dict[str, float], gate: Any, up: Any) -> torch.Tensor:
    """What the docstrings of ``flashinfer.fused_moe``'s classes say."""
    if name == "ReLU2":
        return gate.relu().square()
    assert name == "SwiGLU"
    numbers = {"alpha": 1.0, "beta": 0.0, "limit": 3.4e38} | numbers
    limit = numbers["limit"]
    up, gate = up.clamp(-limit, limit), gate.clamp(max=limit)
    return gate * torch.sigmoid(numbers["alpha"] * gate) * (up + numbers["beta"])


@pytest.mark.parametrize(
    "gate", [SILU, CLAMPED, Gate("swiglu_oai", 1.5, 0.5), Gate("relu2")], ids=str
)
def test_gates_are_flashinfers(gate: Gate) -> None:
    name, numbers = flashinfer_cutile.activation(gate)
    one, other = (9 * torch.randn(64, generator=random(seed)) for seed in (0, 1))
    expected = gate.apply(one, other) if gate.gated else gate.apply(one)
    torch.testing.assert_close(flashinfers(name, numbers, one, other), expected)


# What they cannot run.


@pytest.mark.parametrize(
    ("refuse", "shape", "said"),
    [
        (flashinfer_cutile.refuse, MORE["gpt-oss-120b"], "no biases"),
        (flashinfer_cutile.refuse, Shape("x", 4, 96, 128, 1), "hidden size 96"),
        (flashinfer_cutile.refuse, Shape("x", 4, 128, 96, 1), "intermediate size 96"),
        (flashinfer_cutile.refuse, Shape("x", 4, 128, 128, 1, Gate("situ", 4.0)), "gate situ"),
        (flashinfer_fp8.refuse, SHAPES["minimax-m3"], "no alpha and beta"),
        (flashinfer_fp8.refuse, MORE["nemotron-3-nano"], "relu2"),
        (flashinfer_fp8.refuse, Shape("x", 4, 128, 128, 1, biased=True), "no biases"),
        (flashinfer_fp8.refuse, SHAPES["qwen3-235b"].slice(8), "intermediate size 192"),
        (flashinfer_fp8.refuse, Shape("x", 4, 192, 128, 1), "hidden size 192"),
    ],
)
def test_what_cannot_be_run_is_said(refuse: Any, shape: Shape, said: str) -> None:
    with pytest.raises(AbsentError, match=said) as raised:
        refuse(shape)
    assert "\n" not in str(raised.value)


def test_what_they_run() -> None:
    for shape in SHAPES.values():
        flashinfer_cutile.refuse(shape)
    for name in ("qwen3-235b", "deepseek-v3"):
        flashinfer_fp8.refuse(SHAPES[name])


@pytest.mark.parametrize(("layer", "since"), [(CuTile, "0.7.2"), (FusedFp8, "0.7.4")])
def test_without_flashinfer(layer: Any, since: str, no_flashinfer: None) -> None:
    shape = Shape("x", 4, 128, 128, 1)
    with pytest.raises(AbsentError, match=f"no FlashInfer from {since} on") as raised:
        layer(shape, *random_weights(shape, random()))
    assert "\n" not in str(raised.value)


@pytest.fixture
def no_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where it is not installed, also where it is."""
    if importlib.util.find_spec("flashinfer"):
        monkeypatch.setitem(sys.modules, "flashinfer", None)


# How they count in a run.


class Right:
    """A peer that computes what is asked for, by plain arithmetic."""

    kernel = "plain arithmetic"
    factor = 1.0

    def __init__(self, shape: Shape, w13: Stored, w2: Stored, biases: Any = None) -> None:
        self.given = (shape, w13, w2)

    def __call__(self, given: Batch) -> torch.Tensor:
        return (self.factor * plain(*self.given, given)).bfloat16()


class Absent(Right):
    def __init__(self, *given: Any) -> None:
        raise AbsentError("no such thing: pip install it")


def peers(monkeypatch: pytest.MonkeyPatch, **layers: Any) -> None:
    monkeypatch.setitem(moe_layer.PEERS, "cpu", {n.replace("_", "-"): p for n, p in layers.items()})


def of(file: Path) -> dict[str, Any]:
    (shape,) = json.loads(file.read_text())["shapes"]
    return shape


PEERS = ("--kernels", "ours", "cutile", "flashinfer-fp8")


def test_an_absent_peer_is_no_error(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    peers(monkeypatch, cutile=Absent, flashinfer_fp8=Right)
    file = tmp_path / "results.json"
    assert run("--tokens", "2", "--out", str(file), *PEERS) == 0
    said = capsys.readouterr().out
    assert "FlashInfer cuTile: absent: no such thing: pip install it" in said
    shape = of(file)
    assert shape["absent"] == {"cutile": "no such thing: pip install it"}
    assert set(shape["rows"][0]["ms"]) == {"ours", "flashinfer-fp8"}
    assert "flashinfer-fp8/plain" in shape["errors"] and "| FlashInfer FP8 |" in said
    assert moe_layer.main(["--table", str(file)]) == 0
    assert "Absent: FlashInfer cuTile: no such thing: pip install it." in capsys.readouterr().out


@pytest.mark.parametrize(("factor", "wrong"), [(1.05, ["cutile"]), (1.2, ["cutile", "fp8"])])
def test_peers_are_compared(
    factor: float,
    wrong: list[str],
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Before the timing and after, that with FP8 activations less strictly."""
    off = type("Off", (Right,), {"factor": factor})
    peers(monkeypatch, cutile=off, flashinfer_fp8=off)
    assert run("--tokens", "2", *PEERS) == 1
    said = capsys.readouterr().out.splitlines()
    lines = {line for line in said if line.startswith("WRONG")}  # at once, and again at the end
    for tokens in (32, 2):
        found = [line for line in lines if f" {tokens} tokens" in line and "ours" in line]
        assert len(found) == len(wrong)
        assert all(any(name in line for line in found) for name in wrong)


def test_a_peer_that_fails_hides_nothing(
    small: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    class Failing(Right):
        def __call__(self, given: Batch) -> torch.Tensor:
            raise RuntimeError("no kernel image")

    peers(monkeypatch, cutile=Failing, flashinfer_fp8=Right)
    file = tmp_path / "results.json"
    assert run("--tokens", "2", "--out", str(file), *PEERS) == 1
    said = capsys.readouterr().out
    for tokens in (32, 2):
        assert f"WRONG tiny tp1, {tokens} tokens: cutile: RuntimeError: no kernel image" in said
    shape = of(file)
    pairs = {"ours/flashinfer-fp8", "ours/plain", "flashinfer-fp8/plain"}
    assert set(shape["errors"]) == pairs and set(shape["rows"][0]["ms"]) == {
        "ours",
        "flashinfer-fp8",
    }


def test_fp8_activations_are_no_rivals_whosever_they_are() -> None:
    saved = {"tokens": 1, "active": 4, "ms": {"ours": 2.0, "cutile": 3.0, "flashinfer-fp8": 1.0}}
    about = {"bandwidth": 4.3, "flops": 790.0}
    assert moe_layer.most("ours", "flashinfer-fp8") == moe_layer.APART_FP8
    assert Row(SHAPES["qwen3-235b"], saved, about).ratio == 1.5


# Calls, with stand-ins for FlashInfer.


class Runner:
    """Doubles, if it is given the tactic of so many tokens; remembers what it was tuned with."""

    backend_key = "cutile_nvfp4"

    def pack_inputs(self, pack: Any, weights: Any) -> list[Any]:
        return list(pack)

    def forward(self, inputs: list[Any], tactic: Any) -> torch.Tensor:
        x, _, ids, weights = inputs
        assert tactic == f"tiles of {len(x)}" and int(ids.max()) == 3 and float(weights.min()) == 1
        return 2 * x


def test_cutile_is_tuned_once_for_each_number_of_tokens() -> None:
    tuned = []

    class Tuned(CuTile):
        def __init__(self) -> None:
            self.runner, self.weights, self.tactics = Runner(), None, {}
            self.flashinfer = SimpleNamespace(MoEActivationPack=lambda *given: given)

        def tune(self, inputs: Any) -> Any:
            x, _, ids, weights = inputs
            tuned.append(len(x))
            for tensor in (x, ids, weights):
                tensor.zero_()  # as FlashInfer's tuner does
            return f"tiles of {len(x)}"

    layer = Tuned()
    for tokens in (4, 8, 4):
        given = Batch(torch.ones(tokens, 2), torch.ones(tokens, 1), torch.full((tokens, 1), 3))
        assert torch.equal(layer(given), torch.full((tokens, 2), 2.0))
    assert tuned == [4, 8]


def test_the_fused_kernel_has_memory_for_one_number_of_tokens() -> None:
    """What it had for another is given back."""
    alive: list[int] = []

    class Buffer:
        def __init__(self, experts: int, tokens: int, *sizes: int, nvfp4_kperm: int) -> None:
            assert (experts, sizes, nvfp4_kperm) == (16, (4, 256, 128, 0, 1), 64)
            self.num_max_tokens = tokens
            self.x = self.x_sf = self.topk_idx = self.topk_weights = None
            alive.append(tokens)

        def destroy(self) -> None:
            alive.remove(self.num_max_tokens)

    layer = FusedFp8.__new__(FusedFp8)
    layer.shape, layer.buffer, layer.weights, layer.write = TINY, None, ("w13", "w2"), None

    def stage(x: Any, weights: Any, ids: Any, *into: Any, **how: Any) -> None:
        layer.staged = x

    def launch(out: None, w13: str, w2: str, buffer: Buffer, num_tokens: int) -> torch.Tensor:
        assert (w13, w2, num_tokens) == ("w13", "w2", buffer.num_max_tokens)
        return 3 * layer.staged

    layer.staging = SimpleNamespace(stage_mega_moe_inputs=stage)
    layer.package = SimpleNamespace(
        get_symm_buffer_for_hopper_nvfp4_mega_moe=Buffer, hopper_nvfp4_mega_moe=launch
    )
    for tokens in (4, 4, 8):
        given = batch(TINY, tokens, False, random(tokens))
        assert torch.equal(layer(given), 3 * given.x)
        assert alive == [tokens]
