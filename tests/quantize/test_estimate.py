"""How long calibration takes is said before, from one expert; too much is refused."""

from __future__ import annotations

import json
import re
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from quantize.calibration import estimate as module
from quantize.calibration import host_memory
from quantize.calibration.bits import within_bits
from quantize.calibration.estimate import Seconds, estimate, measure
from quantize.calibration.host_memory import HostMemory
from quantize.calibration.layer_loss import LossGatherer
from quantize.calibration.quantizer import Rounder
from quantize.calibration.step_times import by_time
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import TooMuchError
from quantize.execute import execute
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.rounding.method import Method
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan
from tests.quantize.test_cli import refusal, run
from tests.trained import Sizes

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def steps_of(checkpoint: Checkpoint, method: str | None, **more: Any) -> Any:
    calibration = Calibration("text", 16, 128, "digest", method, **more)
    return plan(checkpoint, Options(calibration=calibration, include=("*.layers.[13].*",)))


@pytest.mark.parametrize("every", [False, True])
def test_one_expert_is_really_rounded(
    every: bool, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its own weights, the method, and as many tokens as an expert gets on average."""
    given: list[tuple[torch.Tensor, ...]] = []
    descent = METHODS["descent"]

    def spy(*args: Any) -> Any:
        given.append(args)
        return descent.round(*args)

    monkeypatch.setattr("quantize.nvfp4.rounding.descent.DESCENT", Method(spy))
    seen: list[int] = []
    rounds = Rounder.round
    monkeypatch.setattr(
        Rounder, "round", lambda self, work: seen.append(len(work.routing.x)) or rounds(self, work)
    )
    with Checkpoint(trained) as checkpoint:
        steps = steps_of(checkpoint, "descent", every_expert=every)
        found = estimate(checkpoint, steps, steps.groups, CPU)
    config = json.loads((trained / "config.json").read_text())
    per_expert = 16 * 128 * config["num_experts_per_tok"] // config["num_local_experts"]
    assert seen == [16 * 128 if every else per_expert] * 2  # the first compiles
    assert found.tokens == seen[0]
    gate_up, down = given[-2:]
    with safe_open(trained / "model.safetensors", "pt") as file:
        weights = file.get_tensor("model.layers.1.mlp.experts.down_proj")
    assert torch.equal(down[0], weights[0].float())
    assert gate_up[0].shape == (2 * Sizes.of(trained).intermediate, Sizes.of(trained).hidden)


def test_what_is_measured(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 13.0, 43.0])
    monkeypatch.setattr(module, "clock", lambda: next(times))
    with Checkpoint(trained) as checkpoint:
        steps = steps_of(checkpoint, "gptq")
        assert measure(checkpoint, steps, steps.groups[0], 40, CPU) == Seconds(1, 2, 30)


@pytest.mark.parametrize(
    ("method", "counting", "reads", "works"),
    [
        ("gptq", False, 1, 1),
        ("gptq", True, 2, 2),
        ("two-sided", True, 3, 5),  # forward, which counts; outputs again; gradients
        (None, True, 1, 1),
    ],
)
def test_all_experts_take_as_long_as_one(
    method: str | None, counting: bool, reads: int, works: int, trained: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sizes = Sizes.of(trained)
    calls: list[int] = []

    def measured(checkpoint: Any, steps: Any, group: Any, tokens: int, *_: Any) -> Seconds:
        calls.append(tokens)
        return Seconds(1, 2, 30)

    monkeypatch.setattr(module, "measure", measured)
    with Checkpoint(trained) as checkpoint:
        steps = steps_of(checkpoint, method)
        found = estimate(checkpoint, steps, steps.groups, CPU, counting)
    with safe_open(trained / "model.safetensors", "pt") as file:
        beside = sum(
            file.get_tensor(name).numel()
            for name in file.keys()  # noqa: SIM118
            for layer in range(4)
            if f".layers.{layer}." in name and ".mlp.experts." not in name
        )
    (tokens,) = calls
    work = 3 * sizes.hidden * sizes.intermediate * tokens  # in two seconds
    experts = 2 * sizes.experts * (reads * 1 + works * 2 + 30)
    assert found.seconds == pytest.approx(experts + 2 * works * beside * 16 * 128 * 2 / work)
    assert (found.experts, found.group.hidden) == (2 * sizes.experts, sizes.hidden)


@pytest.mark.parametrize(
    ("method", "devices", "rounding"),
    [
        ("gptq", 2, 30 / 2 - 3),  # an expert is read and computed while others are rounded
        ("gptq", 16, 0),  # the pass takes longer
        ("gptq", 5, 30 * 4 / 16 - 3),  # one of them has four of the 16, the others three
        ("two-sided", 2, 30 / 2 - 7),
        (None, 8, 30),  # gathering ranges is a part of the pass
    ],
)
def test_several_devices_take_their_shares(
    method: str | None, devices: int, rounding: float, trained: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert Sizes.of(trained).experts == 16
    monkeypatch.setattr(module, "measure", lambda *_: Seconds(1, 2, 30))
    monkeypatch.setattr(module, "_beside", lambda *_: 0)
    with Checkpoint(trained) as checkpoint:
        steps = steps_of(checkpoint, method)
        found = estimate(checkpoint, steps, steps.groups, CPU, devices=devices)
    reads, works = (3, 5) if method == "two-sided" else (1, 1)
    assert found.seconds == pytest.approx(32 * (reads * 1 + works * 2 + rounding))
    assert (f" on {devices} devices: " in str(found)) is (method is not None)


def test_experts_that_are_rounded_together_are_measured_together(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them with its tokens: without, it would not be rounded."""
    given: list[int] = []

    def together(jobs: Any, count: int) -> Any:
        rounded = [METHODS["gptq"].round(*job) for job in jobs]
        given.append(len(rounded))
        return rounded

    fake = {"gptq": replace(METHODS["gptq"], together=together)}
    monkeypatch.setattr("quantize.calibration.quantizer.METHODS", fake)
    monkeypatch.setattr(module, "side_by_side", lambda *_: 3)
    times = iter([10.0, 11.0, 13.0, 43.0])
    monkeypatch.setattr(module, "clock", lambda: next(times))
    with Checkpoint(trained) as checkpoint:
        steps = steps_of(checkpoint, "gptq")
        assert measure(checkpoint, steps, steps.groups[0], 40, CPU) == Seconds(1, 2, 10)
    assert given == [3, 3]


SIZE = ("--calibration-rows", "4", "--calibration-length", "64", "--include", "*.layers.1.*")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("".join(f"x{n} = {n}\n" for n in range(999)))
    return tmp_path / "a.txt"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("time", r"calibration would take about .* for one of .* give --yes"),
        ("memory", r"calibration needs about .* of memory, and cpu has 1.0 kB.* give --yes"),
    ],
)
@pytest.mark.parametrize("option", ["--calibrate", "--input-scales", "--bits"])
def test_too_much_is_refused_unless_the_user_insists(
    option: str, what: str, message: str, trained: Path, text: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if what == "time":
        monkeypatch.setattr(module, "LIMIT", 1e-9)
    else:
        monkeypatch.setattr(module, "memory_of", lambda _: HostMemory(1000))
    out = tmp_path / "out"
    bits = ("--bits", "5") if option == "--bits" else ()
    read = option if not bits else "--input-scales"
    command = ("quantize", trained, out, read, text, *bits, *SIZE, "--device", "cpu")
    said = refusal(*command, code=2)
    assert re.search(message, said)
    if what == "time":
        assert ("measuring layers' losses would take about" in said) is bool(bits)
    assert not out.exists() or not list(out.iterdir())
    result = run(*command, "--yes")
    assert result.exit_code == 0, result.output
    assert "Calibration: about" in result.stderr and " for one of " in result.stderr
    measures = re.search("Measuring .* about .* for one of .*; then calibration: ", result.stderr)
    assert bool(measures) is bool(bits)
    assert (out / "config.json").exists()
    assert "--yes" not in (out / "nvfp4_moe_report.json").read_text()


def told_by_their_time(told: list[tuple[float, int, float]], total: float, trained: Path) -> None:
    """What was told of steps (how many are done, of how many, and when) is how much of the time is
    over, in which two layers' experts took ten seconds each."""
    assert total == 10 * 2 * Sizes.of(trained).experts
    assert told[-1][0] == told[-1][1]
    for done, of, moment in told:
        assert done / of == pytest.approx(moment / total, abs=0.02)


@pytest.mark.parametrize("method", ["gptq", "two-sided"])
def test_steps_are_told_of_by_their_time(
    method: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with a clock that only rounding moves: what is said is left is what is left, all the
    time, though half of two-sided's steps, and layers without experts to round, take no time."""
    now, rounds = [0.0], Rounder.round

    def slow(self: Rounder, work: Any) -> Any:
        now[0] += 10
        return rounds(self, work)

    monkeypatch.setattr(module, "measure", lambda *_: Seconds(1e-9, 1e-9, 10))
    monkeypatch.setattr(Rounder, "round", slow)
    told: list[tuple[float, int, float]] = []
    samples = torch.randint(5, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    with Checkpoint(trained) as checkpoint:
        calibration = Calibration("text", 4, 64, "digest", method)
        steps = plan(checkpoint, Options(calibration=calibration, include=("*.layers.[13].*",)))
        execute(
            checkpoint, steps, tmp_path / "out", devices=[CPU], samples=samples, limited=True,
            calibrating=lambda done, of, _: told.append((done, of, now[0])),
        )  # fmt: skip
    told_by_their_time(told, now[0], trained)


def test_measuring_is_told_of_by_its_time(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its passes are those of ``two-sided``, and experts are looked at on the way back."""
    now, looks = [0.0], LossGatherer.expert

    def slow(self: LossGatherer, *what: Any) -> Any:
        now[0] += 10 * (self._group is not None)
        return looks(self, *what)

    monkeypatch.setattr(module, "measure", lambda *_: Seconds(1e-9, 1e-9, 10))
    monkeypatch.setattr(LossGatherer, "expert", slow)
    told: list[tuple[float, int, float]] = []
    samples = torch.randint(5, 500, (4, 64), generator=torch.Generator().manual_seed(0))
    with Checkpoint(trained) as checkpoint:
        options = Options(bits=6.0, include=("*.layers.[13].*",))
        steps = plan(checkpoint, replace(options, bits=None))
        calibration = Calibration("text", 4, 64, "digest", None)
        steps = replace(steps, options=replace(steps.options, calibration=calibration))
        within_bits(
            checkpoint, steps, options, samples, tmp_path / "out", CPU,
            progress=lambda done, of, _: told.append((done, of, now[0])),
        )  # fmt: skip
    told_by_their_time(told, now[0], trained)


@pytest.mark.parametrize("steps", [((1.0,), (3.0, 0.0, 5.0), (1.0,)), ((2.0,),) * 3, ()])
def test_steps_by_time(steps: Any) -> None:
    told: list[tuple[float, int, str]] = []
    report = by_time(lambda *all_: told.append(all_), steps)
    moments = [n / 60 for n in range(181)]
    for moment in moments:
        report(moment, 3, "here")
    assert {rest for _, *rest in told for rest in [tuple(rest)]} == {(3, "here")}
    done = [one for one, *_ in told]
    assert done == sorted(done) and done[0] == 0 and done[-1] == pytest.approx(3)
    if len(steps) == 3 and len(steps[1]) == 3:
        # A third of the second step, then nothing for as long, then the last third of it.
        assert [done[n] for n in (60, 80, 100, 120)] == pytest.approx([0.3, 1.2, 1.2, 2.7])
        report(1, 7, "another pass")
        assert told[-1] == (1, 7, "another pass")
    else:
        assert done == pytest.approx(moments)


def test_three_days_are_the_limit() -> None:
    group: Any = type("Group", (), {"hidden": 6144, "intermediate": 3072})()
    for seconds, refused in ((3 * 86400 - 1, False), (3 * 86400 + 1, True)):
        found = module.Estimate(seconds, Seconds(0.1, 0.05, 0.2), group, 16384, 7296)
        assert str(found) == (
            "about 3 d 0 h here: 0.35 s for one of 7296 experts (6144 x 3072, with 16384 tokens; "
            "measured)"
        )
        if refused:
            with pytest.raises(TooMuchError, match="3 d 0 h"):
                module.check(found)
        else:
            module.check(found)


def machine_memory() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    (total,) = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal")]
    return total


def control_groups(folder: Path, monkeypatch: pytest.MonkeyPatch, membership: str) -> None:
    """Have the process believe that its groups are in ``folder``."""
    (folder / "self").write_text(membership)
    monkeypatch.setattr(host_memory, "MEMBERSHIP", folder / "self")
    monkeypatch.setattr(host_memory, "MOUNTS", (folder, folder / "unified", folder / "memory"))


def test_the_machines_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    control_groups(tmp_path, monkeypatch, "0::/\n")
    assert module.memory_of(CPU) == HostMemory(machine_memory())


@pytest.mark.parametrize(
    ("membership", "files", "least"),
    [
        # Version 2: also a group around the process's own.
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "5000"}, "a/memory.max"),
        ("0::/a/b", {"a/b/memory.max": "4000", "a/memory.max": "5000"}, "a/b/memory.max"),
        # A container sees its own group as the root, and may be told its path outside.
        ("0::/", {"memory.max": "4000"}, "memory.max"),
        ("0::/outside", {"memory.max": "4000"}, "memory.max"),
        # Version 1, and both side by side.
        (
            "9:cpu:/x\n4:memory:/m\n0::/",
            {"memory/m/memory.limit_in_bytes": "4000", "memory/memory.limit_in_bytes": str(2**63)},
            "memory/m/memory.limit_in_bytes",
        ),
        ("4:pids,memory:/\n0::/u", {"unified/u/memory.max": "4000"}, "unified/u/memory.max"),
        # Of a group that the process is not in.
        ("0::/a", {"b/memory.max": "4000"}, None),
        ("3:cpu:/m", {"memory/m/memory.limit_in_bytes": "4000"}, None),
    ],
)
def test_memory_is_what_the_control_groups_allow(
    membership: str, files: dict[str, str], least: str | None, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    control_groups(tmp_path, monkeypatch, membership)
    for name, limit in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{limit}\n")
    found = module.memory_of(CPU)
    if least is None:
        assert found == HostMemory(machine_memory())
        return
    assert found.nbytes == int(files[least])
    with pytest.raises(TooMuchError, match=re.escape(f"(the limit in {tmp_path / least})")):
        module.check_memory(found.nbytes + 1, CPU)
    module.check_memory(found.nbytes, CPU)


@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_memory_is_what_the_process_may_take(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control_groups(tmp_path, monkeypatch, "")
    which = getattr(resource, name)
    limit = 2**40 if machine_memory() > 2**41 else machine_memory() - 2**20
    before = resource.getrlimit(which)
    resource.setrlimit(which, (limit, before[1]))
    try:
        found = module.memory_of(CPU)
    finally:
        resource.setrlimit(which, before)
    assert found.nbytes == limit and name in found.why


def test_measuring_for_bits_is_three_reads_and_the_products_of_both_ways(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward, and back: outputs twice more and gradients; an expert is looked at, not rounded.
    Together with calibration it may not take more than is allowed."""
    monkeypatch.setattr(module, "measure", lambda *_: Seconds(1, 2, 40))
    monkeypatch.setattr(module, "_beside", lambda *_: 0)
    with Checkpoint(trained) as checkpoint:
        steps = steps_of(checkpoint, "two-sided")
        looked: Any = lambda group: None  # noqa: E731
        found = estimate(checkpoint, steps, steps.groups, CPU, look=looked)
    count = 2 * Sizes.of(trained).experts
    assert found.seconds == pytest.approx(count * (3 * 1 + 5 * 2 + 40))
    half = found._replace(seconds=0.6 * module.LIMIT)
    module.check(half)
    with pytest.raises(TooMuchError, match=r"measuring layers' losses .*; and then calibration"):
        module.check(half, half)
