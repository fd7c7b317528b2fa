"""Experts rounded on several devices at once: the same bytes, whoever does it, and whoever fails.

The devices are the CPU, several times over: each is a member with a thread of its own, as each GPU
is. What only GPUs have (streams, copies between them) is in ``tests/gpu/test_crew.py``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantize.calibration.crew import Device, LostError, Outcome, Work, on_devices
from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.quantizer import Rounder
from quantize.calibration.room import _share_out
from quantize.calibration.routing import Routing
from quantize.calibration.samples import load_samples
from quantize.errors import DamagedWeightsError, QuantizeError
from quantize.execute import _gpus_or_all
from quantize.experts.gates import Gate
from quantize.nvfp4.rounding import METHODS
from quantize.run.options import Options
from tests.quantize.test_calibration import calibrated, interrupted, resumed
from tests.quantize.test_cli import refusal

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
THREE = [CPU] * 3
ONE_LAYER = Options(include=("*.layers.1.*",))
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def rows(trained: Path, text: Path) -> torch.Tensor:
    return load_samples(text, trained, 8, 128)


@pytest.fixture(scope="module")
def alone(
    trained: Path, rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], bytes]:
    """``alone(method)``: the weights that one device makes."""
    made: dict[str, bytes] = {}

    def alone(method: str) -> bytes:
        if method not in made:
            torch.set_num_threads(1)
            target = tmp_path_factory.mktemp(method) / "out"
            calibrated(trained, target, rows, ONE_LAYER, settings={"method": method}, devices=[CPU])
            made[method] = (target / WEIGHTS).read_bytes()
        return made[method]

    return alone


@pytest.mark.parametrize("method", METHODS)
def test_three_devices_make_what_one_makes(
    method: str, trained: Path, rows: torch.Tensor, alone: Callable[[str], bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """And do it at once: the first three experts wait for each other."""
    want = alone(method)
    meet, seen = threading.Barrier(3, timeout=60), []
    rounds = Rounder.round

    def spy(self: Rounder, work: Work) -> list[Outcome]:
        seen.append((threading.current_thread().name, [number for number, _ in work.experts]))
        if len(seen) <= 3:
            meet.wait()
        return rounds(self, work)

    monkeypatch.setattr(Rounder, "round", spy)
    out = tmp_path / "out"
    calibrated(trained, out, rows, ONE_LAYER, settings={"method": method}, devices=THREE)
    assert (out / WEIGHTS).read_bytes() == want
    assert len({thread for thread, _ in seen}) == 3
    numbers = sorted(number for _, numbers in seen for number in numbers)
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize(("first", "second"), [(THREE, [CPU]), ([CPU], THREE)])
def test_another_number_of_devices_goes_on(
    first: list[torch.device], second: list[torch.device], trained: Path, rows: torch.Tensor,
    alone: Callable[[str], bytes], tmp_path: Path,
) -> None:  # fmt: skip
    out, of = tmp_path / "out", {"settings": {"method": "gptq"}}
    interrupted(1.6, trained, out, rows, ONE_LAYER, devices=first, **of)
    assert not (out / "config.json").exists()
    assert min(resumed(trained, out, rows, ONE_LAYER, devices=second, **of)) == 1
    assert (out / WEIGHTS).read_bytes() == alone("gptq")


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> None:
    """Members whose numbers ``fails`` is true of run out of a GPU's memory at their second expert.
    They take their experts in turn until then."""
    begun: dict[Device, int] = {}
    rounds, of = Device.round, {}

    def round_or_fail(self: Device, work: Work) -> list[Outcome]:
        number = of.setdefault(self, len(of))
        begun[self] = begun.get(self, 0) + 1
        if begun[self] == 2 and fails(number):

            def out_of_memory(_: Work) -> list[Outcome]:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nMore")

            self._round = out_of_memory
        return rounds(self, work)

    monkeypatch.setattr(Device, "round", round_or_fail)


def test_experts_of_a_device_that_fails_go_to_the_others(
    trained: Path, rows: torch.Tensor, alone: Callable[[str], bytes], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    failing(monkeypatch, lambda number: number > 0)
    said: list[str] = []
    out = tmp_path / "out"
    calibrated(
        trained, out, rows, ONE_LAYER, settings={"method": "gptq"}, devices=THREE, say=said.append
    )
    assert (out / WEIGHTS).read_bytes() == alone("gptq")
    lost = [line for line in said if "is lost" in line]
    assert lost == [
        "Warning: cpu is lost (OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB.); "
        "others round its experts"
    ] * 2  # fmt: skip


def test_no_device_is_left(
    trained: Path, rows: torch.Tensor, alone: Callable[[str], bytes], tmp_path: Path,
) -> None:  # fmt: skip
    out, of = tmp_path / "out", {"settings": {"method": "gptq"}}
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, lambda _: True)
        with pytest.raises(
            QuantizeError,
            match=r"layers\.1\.mlp\.experts: nothing is left that could round expert \d+: cpu is "
            r"lost too \(OutOfMemoryError.*--device.*--resume",
        ):
            calibrated(trained, out, rows, ONE_LAYER, devices=THREE, **of)
    assert not (out / "config.json").exists()
    resumed(trained, out, rows, ONE_LAYER, devices=THREE, **of)
    assert (out / WEIGHTS).read_bytes() == alone("gptq")


def test_what_is_wrong_with_an_expert_is_said_as_with_one_device(
    trained: Path, rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No member is lost by it, and none is at work any more once it is said."""
    at_work: set[int] = set()
    rounds = Rounder.round

    def damaged(self: Rounder, work: Work) -> list[Outcome]:
        (number,) = (number for number, _ in work.experts)
        at_work.add(number)
        try:
            if number == 5:
                raise DamagedWeightsError("expert 5 is damaged", ["a.safetensors"])
            return rounds(self, work)
        finally:
            at_work.remove(number)

    monkeypatch.setattr(Rounder, "round", damaged)
    said: list[str] = []
    with pytest.raises(DamagedWeightsError, match="expert 5 is damaged"):
        calibrated(
            trained, tmp_path / "out", rows, ONE_LAYER, settings={"method": "gptq"},
            devices=THREE, say=said.append,
        )  # fmt: skip
    assert not at_work
    assert not [line for line in said if "lost" in line]


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (torch.OutOfMemoryError("no"), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR"), True),
        (RuntimeError("The size of tensor a must match"), False),
        (MemoryError(), False),
        (KeyError("x"), False),
    ],
)
def test_what_a_device_is_lost_by(error: Exception, is_lost: bool) -> None:
    def fail(_: Work) -> list[Outcome]:
        raise error

    work: Any = Work(None, [], Routing(*tokens(), 4, CPU))  # type: ignore[arg-type]
    with pytest.raises(LostError if is_lost else type(error)):
        Device(fail, CPU).round(work)


def test_a_broken_gpu_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not even free its memory."""

    def broken(*_: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access")

    member = Device(broken, CPU)
    member._device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    monkeypatch.setattr(Routing, "on", lambda self, _: self)
    work: Any = Work(None, [], Routing(*tokens(), 4, CPU))  # type: ignore[arg-type]
    with pytest.raises(LostError, match="AcceleratorError: CUDA error: an illegal memory access"):
        member.round(work)


def test_experts_that_do_not_fit_together_are_rounded_one_by_one() -> None:
    def fit_alone(work: Work) -> list[Outcome]:
        if len(work.experts) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [number for number, _ in work.experts]  # type: ignore[misc]

    class Weights:
        def on(self, _: torch.device) -> Weights:
            return self

    experts: Any = [(number, Weights()) for number in (3, 5, 8)]
    work = Work(None, experts, Routing(*tokens(), 4, CPU))  # type: ignore[arg-type]
    assert Device(fit_alone, CPU).round(work) == [3, 5, 8]


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(64, 32), torch.randint(0, 4, (64, 2)).int(), torch.rand(64, 2)


def test_nothing_stays_behind_on_the_device_it_came_from() -> None:
    """``meta`` is another device that any machine has; it has no numbers, only places."""
    meta = torch.device("meta")
    norm = torch.nn.LayerNorm(32)
    weights = ExpertWeights(
        (torch.randn(16, 32), torch.randn(16, 32)), torch.randn(32, 16),
        (torch.randn(16), torch.randn(16), torch.randn(32)), Gate("silu"), norm,
    )  # fmt: skip
    there = weights.on(meta)
    x = torch.randn(5, 32, device=meta)
    assert there.output(there.intermediate(x)).device == meta
    assert there.product_gradient(x, torch.randn(5, 32, device=meta)).device == meta
    assert weights.on(CPU) is weights
    assert next(norm.parameters()).device == CPU
    routing = Routing(*tokens(), 4, CPU, torch.randn(64, 32))
    assert routing.on(CPU) is routing
    moved = routing.on(meta)
    for here, chunk in zip(routing.of(1), moved.of(1), strict=True):
        assert {chunk.x.device, chunk.weights.device, chunk.gradient.device} == {meta}  # type: ignore[union-attr]
        assert torch.equal(chunk.tokens, here.tokens)
        assert here.x.device == CPU


@pytest.mark.parametrize("devices", [1, 2, 3, 8, 200])
def test_every_device_has_as_much_to_do(devices: int) -> None:
    method = METHODS["two-sided"]
    for free in (0, 2e10, 6e10, 1.1e11):
        # What the first GPU keeps for the others leaves less for its own.
        read = 3 * 6144 * 3072 * 4
        most = _share_out(128, 6144, 3072, method, free)
        size = _share_out(128, 6144, 3072, method, free, devices)
        assert 1 <= size <= most
        batches = -(-128 // size)
        if size > 1:
            assert size * devices * read < free
        # No round in which most devices have nothing to do, unless there are not enough experts.
        rounds = -(-batches // devices)
        assert size * devices * (rounds - 1) < 128 <= size * devices * rounds
        assert batches >= min(devices, 128) / 2


def test_gpus_do_it_where_there_are_any() -> None:
    gpus = [torch.device("cuda", 1), torch.device("cuda", 0)]
    assert _gpus_or_all([CPU, *gpus]) == gpus
    assert _gpus_or_all([CPU]) == [CPU]


def test_a_crew_of_devices_asks_for_batches_that_fit_on_each() -> None:
    group: Any = None
    with on_devices(lambda _: [], THREE, lambda _: None) as crew:
        assert crew.together(group, METHODS["two-sided"]) == 1  # on CPUs


def test_progress_counts_what_is_done(
    trained: Path, rows: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what was only handed out: else the first experts would seem to take no time at all."""
    go_on = threading.Event()
    rounds = Rounder.round

    def slow(self: Rounder, work: Work) -> list[Outcome]:
        assert go_on.wait(60)
        return rounds(self, work)

    monkeypatch.setattr(Rounder, "round", slow)
    parts: list[str] = []

    def spoken(_: float, __: int, where: str) -> None:
        if ", expert " in where and where.startswith("layer 1,"):
            parts.append(where.partition(", ")[2])
            if len(parts) == 3:
                go_on.set()

    calibrated(
        trained, tmp_path / "out", rows, ONE_LAYER, settings={"method": "gptq"}, devices=THREE,
        calibrating=spoken,
    )  # fmt: skip
    assert parts[:3] == ["expert 0 of 16"] * 3
    numbers = [int(part.split()[1]) for part in parts]
    assert numbers == sorted(numbers)
    assert 16 - 3 <= numbers[-1] <= 16


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (("cuda", "cuda:0"), [torch.device("cuda", 0)]),
        (("cuda:1", "cuda:0", "cuda:1"), [torch.device("cuda", 1), torch.device("cuda", 0)]),
        (("cpu", "cpu"), [CPU]),
        ((), None),
    ],
)
def test_a_device_that_is_named_twice_is_one(
    given: tuple[str, ...], want: list[torch.device] | None, trained: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    found: list[Any] = []

    def stop(*_: Any, devices: Any, **__: Any) -> None:
        found.append(devices)
        raise QuantizeError("enough")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("quantize.execute.execute", stop)
    words = [word for name in given for word in ("--device", name)]
    assert "enough" in refusal("quantize", trained, tmp_path / "out", *words)
    assert found == [want]
