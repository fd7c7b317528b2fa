"""How far a command is: lines where there is no terminal, with a clock of the tests' own; bars."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from quantize.cli import progress
from quantize.cli.progress import EVERY, Bar, Shown, ShownAsBars, Work
from quantize.duration import duration, speed
from quantize.run.sessions import REPRODUCIBLE
from tests.quantize.checkpoints import ONE_THREAD
from tests.trained import Sizes


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    found = io.StringIO()
    monkeypatch.setattr(progress, "err", Console(file=found, width=40))
    return found


def test_a_line_a_minute(printed: io.StringIO) -> None:
    """One when work begins, one each minute though nothing has happened, one at the end."""
    clock, waited = Clock(), []
    shown = Shown()
    bar = Bar(shown, "Quantizing", 4 * 10**9, clock)
    moments: list[Any] = [
        lambda: bar.calibrating(0, 8, "layer 0"),
        lambda: bar.calibrating(0.5, 8, "layer 0, expert 4 of 8"),
        lambda: None,
        lambda: [bar.calibrating(6, 8, f"layer {n}") for n in range(6)],
        lambda: (bar.advance(0), bar.calibrating(8, 8, "done")),
        lambda: (bar.advance(10**9), bar.say("a [b]line[/b]")),
    ]

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        clock.now += seconds
        if moments:
            moments.pop(0)()
            return False
        bar.advance(3 * 10**9)
        return True

    shown.print_until(wait)
    assert set(waited) == {EVERY} and EVERY == 60
    assert printed.getvalue().splitlines() == [
        "Calibrating: layer 0, 0%",
        "Calibrating: layer 0, 0%",
        "Calibrating: layer 0, expert 4 of 8, 6%, 15 min left",
        "Calibrating: layer 0, expert 4 of 8, 6%, 30 min left",
        "Calibrating: layer 5, 75%, 60 s left",
        "Quantizing: 0 bytes of 4.0 GB, 0%",
        "Calibrating: done, 100%",
        "Calibrating: done, 100%",
        "Quantizing: 1.0 GB of 4.0 GB, 25%, 0.02 GB/s, 3 min left",
        "a [b]line[/b]",
        "Quantizing: 1.0 GB of 4.0 GB, 25%, 0.02 GB/s, 3 min left",
        "Quantizing: 4.0 GB of 4.0 GB, 100%, 0.03 GB/s",
    ]


def test_what_an_earlier_run_has_done_took_no_time(printed: io.StringIO) -> None:
    clock = Clock()
    work = Work("Calibrating", 60, clock, steps=True)
    work.update(40, "layer 40")
    clock.now += 100
    work.update(45, "layer 45")
    assert str(work) == "Calibrating: layer 45, 75%, 5 min left"


def begun(kind: str, clock: Clock, total: int, before: int) -> tuple[Work, Callable[[int], None]]:
    """Work of which ``before`` was done earlier, and that begins now; and what tells it of more."""
    bar = Bar(Shown(lambda _: None), "Quantizing", total, clock)
    work = bar._bytes
    if kind == "steps":
        work = Work("Calibrating", total, clock, steps=True, read=lambda: int(1e9 * clock.now))
        work.update(before, "layer 0")
        return work, lambda more: work.update(work.done + more, "layer 0, expert 1")
    if before:
        bar.advance(before)
    if kind == "bytes after passes":
        for step in range(3):
            clock.now += 3600
            bar.calibrating(step, 2, f"layer {step}")
    clock.now += 900  # whatever else there is to do before
    bar.advance(0)
    return work, bar.advance


@pytest.mark.parametrize("before", [0, 4 * 10**7])
@pytest.mark.parametrize("kind", ["bytes", "bytes after passes", "steps"])
def test_no_hours_are_promised_by_a_few_bytes(kind: str, before: int) -> None:
    """What the first bytes took is how long it takes to begin. From ten seconds on there is a
    speed; and an end, once a hundredth is done too: that of this phase, by its own time alone."""
    clock = Clock()
    work, advance = begun(kind, clock, before + 6 * 10**7, before)
    clock.now += 0.22
    advance(768)
    assert "left" not in str(work) and "/s" not in str(work)
    clock.now += 9.7
    advance(10**7)
    assert "left" not in str(work) and "/s" not in str(work)  # 9.92 s
    clock.now += 0.08
    assert str(work).endswith("50 s left" if kind == "steps" else "1.0 MB/s, 50 s left")

    work, advance = begun(kind, clock, before + 6 * 10**7, before)
    clock.now += 120
    advance(768)
    assert "left" not in str(work)
    assert str(work).endswith("1.00 GB/s" if kind == "steps" else "6 bytes/s")
    advance(6 * 10**5 - 769)
    assert "left" not in str(work)
    advance(1)
    assert str(work).endswith(", 3 h 18 min left")  # 99 times two minutes


def test_work_that_is_soon_over_has_its_speed(printed: io.StringIO) -> None:
    clock = Clock()
    bar = Bar(Shown(), "Verifying", 6 * 10**7, clock)
    bar.advance(0)
    clock.now += 0.3
    bar.advance(6 * 10**7)
    bar.say(str(bar._bytes))
    first, last = printed.getvalue().splitlines()
    assert first == "Verifying: 0 bytes of 60.0 MB, 0%"
    assert last == "Verifying: 60.0 MB of 60.0 MB, 100%, 0.20 GB/s"


@pytest.mark.parametrize("before", [0, 10**9])
def test_the_hours_of_passes_are_not_those_of_bytes(printed: io.StringIO, before: int) -> None:
    """A run counts the bytes that an earlier one has done, then calibrates, then does the rest."""
    clock = Clock()
    bar = Bar(Shown(), "Quantizing", 5 * 10**9, clock)
    bar.advance(before)
    for step in range(9):
        bar.calibrating(step, 8, f"layer {step}")
        clock.now += 0 if step == 8 else 3600
    clock.now += 10
    bar.advance(10**9)
    left = (5 * 10**9 - before - 10**9) / 10**8
    bar.say(str(bar._bytes))
    last = printed.getvalue().splitlines()[-1]
    assert last.endswith(f", 0.10 GB/s, {left:.0f} s left")


def test_bars_say_the_same() -> None:
    clock, found = Clock(), io.StringIO()
    console = Console(file=found, force_terminal=True, width=200)
    with Progress(
        TextColumn("{task.description} {task.percentage:.0f} {task.fields[about]}"),
        console=console, auto_refresh=False,
    ) as bars:  # fmt: skip
        bar = Bar(ShownAsBars(bars), "Quantizing", 4 * 10**9, clock)
        bar.calibrating(0, 8, "layer 0")
        clock.now += 60
        bar.calibrating(2, 8, "layer [2]")
        bar.advance(10**9)
        bars.refresh()
    last = found.getvalue()
    assert "Calibrating 25 layer [2], 3 min left" in last
    assert "Quantizing 25 1.0 GB of 4.0 GB" in last


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.352, "0.35 s"), (9.94, "9.9 s"), (9.96, "10 s"), (99.4, "99 s"),
        (100, "2 min"), (5900, "98 min"), (6000, "1 h 40 min"),
        (47 * 3600 + 3500, "47 h 58 min"), (48 * 3600, "2 d 0 h"), (27.6 * 3600 * 10, "11 d 12 h"),
    ],
)  # fmt: skip
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("bytes_a_second", "said"),
    [
        (1.234e9, "1.23 GB/s"), (1e7, "0.01 GB/s"), (9.99e6, "10.0 MB/s"), (4600, "4.6 kB/s"),
        (8.3, "8 bytes/s"),
    ],
)  # fmt: skip
def test_speeds(bytes_a_second: float, said: str) -> None:
    assert speed(bytes_a_second) == said


EVERY_UPDATE = """
from quantize.cli import main, progress

class Told(progress.Shown):
    def update(self, work):
        super().update(work)
        self.print()

progress.Shown = Told
progress.ENOUGH_SECONDS = progress.ENOUGH_SHARE = 0
main()
"""
"""The command with a line for every update, and with all that each could say, so that what is said
is the same on any machine."""


def test_a_true_run_in_a_pipe(trained: Path, tmp_path: Path) -> None:
    """A log of a calibrated run says what comes, and where it is: first counting, then rounding."""
    rows = "".join(f"x{n} = {n} + {n * n}\n" for n in range(2000))
    (tmp_path / "a.txt").write_text(rows)
    timed = {name: value for name, value in ONE_THREAD.items() if name != REPRODUCIBLE}
    done = subprocess.run(
        [sys.executable, "-c", EVERY_UPDATE, "quantize", trained, tmp_path / "out", "--calibrate",
         tmp_path / "a.txt", "--rounding", "gptq", "--calibration-rows", "4",
         "--calibration-length", "128", "--include", "*.layers.[13].*"],
        capture_output=True, text=True, check=False, env=timed,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    lines = done.stderr.splitlines()
    experts = Sizes.of(trained).experts
    (found,) = [line for line in lines if f"for one of {2 * experts} experts" in line]
    assert found.startswith("Calibration: about")
    where = rf"layer \d, expert \d+ of {experts}, [^,]+ read, \d+%, [\d.]+ [GM]B/s(, .* left)?"
    for what in ("Counting tokens", "Calibrating"):
        own = [line for line in lines if line.startswith(f"{what}: ")]
        assert own[0] == f"{what}: layer 0, 0%"
        assert [line for line in own if re.fullmatch(rf"{what}: {where}", line)], own
    order = [
        next(n for n, line in enumerate(lines) if line.startswith(what))
        for what in ("Calibration: about", "Counting", "Calibrating: ", "Quantizing: 0 bytes")
    ]
    assert order == sorted(order)
    assert re.fullmatch(r"Quantizing: .*, (\S+ \wB) of \1, 100%, .*B/s", lines[-1])
    report = json.loads((tmp_path / "out" / "nvfp4_moe_report.json").read_text())
    took = report["sessions"][0]["seconds"]["shards"]
    # The seconds of calibrating are no seconds of reading.
    nbytes = sum(file.stat().st_size for file in trained.glob("*.safetensors"))
    summary = re.search(r" ([\d.]+) s, shards at ([\d.]+) (\w+)/s", done.stdout)
    assert summary and float(summary[1]) > took
    said = float(summary[2]) * {"GB": 1e9, "MB": 1e6}[summary[3]]
    assert said == pytest.approx(nbytes / took, rel=0.2)
