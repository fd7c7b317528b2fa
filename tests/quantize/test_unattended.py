"""Runs that people leave alone: what they say, where it is kept, and how they are stopped."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantize.cli import output, progress
from quantize.errors import QuantizeError
from tests.hub_server import environment, serving
from tests.quantize.checkpoints import ONE_THREAD
from tests.quantize.test_cli import refusal, run
from tests.quantize.test_evaluate_run import made, words  # noqa: F401  (a fixture)

Folders = Callable[[str], Path]

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


@pytest.fixture
def source(saved: Folders) -> Path:
    return saved("qwen3_moe")


@pytest.fixture
def every_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line for every update, not for every minute, and with all that it could say."""
    monkeypatch.setattr(progress, "ENOUGH_SECONDS", 0)
    monkeypatch.setattr(progress, "ENOUGH_SHARE", 0)

    class Told(progress.Shown):
        def update(self, work: progress.Work) -> None:
            super().update(work)
            self.print()

    monkeypatch.setattr(progress, "Shown", Told)


# -- a line a minute -------------------------------------------------------------------------------

AMOUNT = r"[\d.]+ (bytes|kB|MB)"
PACE = r"\d+%, [\d.]+ (GB|MB|kB|bytes)/s(, [\d.]+ \w+ left)?"


@pytest.mark.usefixtures("every_update")
def test_what_the_lines_of_each_command_have(
    source: Path, made: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """Layer, expert, bytes, GB/s and time left."""
    one = ("--threads", "1")
    quantized = run("quantize", source, tmp_path / "out", *one).stderr
    against = run("verify", source, tmp_path / "out").stderr
    alone = run("verify", tmp_path / "out").stderr
    evaluated = run(*words(made)).stderr
    expert = r"layer [01], expert [0-3]"
    for said, what in (
        (quantized, rf"Quantizing: {expert}, {AMOUNT} of {AMOUNT}, {PACE}"),
        (against, rf"Verifying: {expert}, {AMOUNT} of {AMOUNT}, {PACE}"),
        (alone, rf"Verifying: {expert}, {AMOUNT} of {AMOUNT}, {PACE}"),
        (evaluated, rf"Evaluating: layer 1 of SRC, expert 2 of 4, {AMOUNT} read, {PACE}"),
        (evaluated, rf"Evaluating: layer 0 of DST, expert 4 of 4, {AMOUNT} read, {PACE}"),
    ):
        lines = said.splitlines()
        found = [line for line in lines if re.fullmatch(what, line)]
        assert found, said
        assert any(" left" in line for line in found) or "Evaluating" in what
    for said in (quantized, against, alone):
        *_, last = (line for line in said.splitlines() if "%" in line)
        assert re.fullmatch(r".*?([\d.]+ \w+) of \1, 100%, .*B/s", last), last


# -- --log-file ------------------------------------------------------------------------------------


def logged(file: Path) -> list[str]:
    """The lines without their times, which all have."""
    found = [re.fullmatch(rf"{TIME} (.*\S)", line) for line in file.read_text().splitlines()]
    assert all(found)
    return [line[1] for line in found if line]


def said(result: Any) -> list[str]:
    return [line.rstrip() for line in result.output.splitlines() if line.strip()]


def test_the_log_has_everything_that_is_said(source: Path, tmp_path: Path) -> None:
    """Of run after run: results, errors and tables too."""
    out, log = tmp_path / "out", tmp_path / "run.log"
    expected = []
    for command in (
        ("quantize", source, out),
        ("quantize", source, out),  # an error
        ("verify", source, out),
        ("verify", source, out, "--json"),
    ):
        result = run(*command, "--log-file", log)
        expected += said(result)
        assert sorted(logged(log)) == sorted(expected)
        assert "run.log" not in result.output
    assert [line for line in logged(log) if line.startswith("error: ")]
    assert "--log" not in (out / "nvfp4_moe_report.json").read_text()


def test_a_log_beside_bars(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal, the log has lines where the terminal has bars."""
    monkeypatch.setattr(output.err, "_force_terminal", True)
    log = tmp_path / "run.log"
    result = run("quantize", source, tmp_path / "out", "--log-file", log)
    assert result.exit_code == 0, result.output
    last = [line for line in logged(log) if line.startswith("Quantizing: ")][-1]
    assert re.fullmatch(rf"Quantizing: .*{AMOUNT} of {AMOUNT}, {PACE}", last)
    assert last not in result.output
    assert "\x1b" not in log.read_text()


@pytest.mark.parametrize("where", ["src", "out"])
def test_a_log_among_a_checkpoint(where: str, source: Path, tmp_path: Path) -> None:
    src = Path(shutil.copytree(source, tmp_path / "src"))
    command = ("quantize", src, tmp_path / "out", "--log-file", tmp_path / where / "run.log")
    assert "which holds a checkpoint" in refusal(*command)
    assert {f.name for f in tmp_path.iterdir()} == {"src"}
    assert not (src / "run.log").exists()


def test_somebody_elses_file_is_not_added_to(source: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("of mine\n")
    assert "not a log of nvfp4-moe" in refusal("verify", source, "--log-file", file)
    assert file.read_text() == "of mine\n"


def test_a_log_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    """If that shows at once, nothing is done; a full disk does not end a run of hours."""
    nowhere = tmp_path / "no" / "such" / "run.log"
    said = refusal("quantize", source, tmp_path / "out", "--log-file", nowhere)
    assert "No such file" in said and "give a file that you can write to" in said
    assert not (tmp_path / "out").exists()
    result = run("quantize", source, tmp_path / "out", "--log-file", "/dev/full")
    assert result.exit_code == 0, result.output
    assert "warning: --log-file /dev/full: No space left on device" in result.stderr
    assert (tmp_path / "out" / "config.json").exists()


# -- --quiet ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("imported", ["before", "within"])
def test_quiet_hub(imported: str) -> None:
    """The hub's client tells of each time that it tries again, as when it is asked too often."""
    code = f"""
from quantize.cli.output import speaking
def retry():
    from huggingface_hub.utils import logging
    logging.get_logger("huggingface_hub.utils._http").warning("HTTP Error 429 thrown. Retrying")
if {imported == "before"}:
    retry()
with speaking(quiet=True):
    retry()
with speaking():
    retry()
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stderr.count("Retrying") == (2 if imported == "before" else 1)


def test_quiet(source: Path, made: Path, tmp_path: Path) -> None:  # noqa: F811
    """Nothing but errors and what was asked for; all of it is in the log."""
    out, log = tmp_path / "out", tmp_path / "run.log"
    result = run("quantize", source, out, "--quiet", "--log-file", log)
    assert (result.exit_code, result.output) == (0, "")
    assert [line for line in logged(log) if "B/s" in line]
    assert run("verify", source, out, "--quiet").output == ""
    result = run("quantize", source, out, "--quiet")
    assert result.exit_code == 1 and result.stdout == ""
    assert re.fullmatch(r"error: .* is not empty; .*\n", result.stderr)
    (out / "generation_config.json").write_text("{}")
    result = run("verify", source, out, "--quiet")
    assert result.exit_code == 1
    assert [line[:9] for line in result.output.splitlines()] == ["problem: "]
    result = run("verify", source, out, "--quiet", "--json")
    assert json.loads(result.stdout)["problems"]
    result = run(*words(made), "--quiet")
    assert result.stderr == "" and "perplexity" in result.stdout
    assert "B/s" in run("quantize", source, tmp_path / "again").output  # it is over


# -- --dry-run -------------------------------------------------------------------------------------


def everything(folder: Path) -> dict[str, tuple[float, bytes]]:
    """All that is below it, folders too, with times."""
    return {
        str(f.relative_to(folder)): (f.stat().st_mtime, f.read_bytes() if f.is_file() else b"")
        for f in folder.rglob("*")
    }


def table_of(shown: str, title: str) -> list[list[str]]:
    """The rows of a table."""
    lines = re.split(r"┡.*┩\n", shown[shown.index(title) :], maxsplit=1)[1].splitlines()
    rows = lines[: next(n for n, line in enumerate(lines) if "└" in line)]
    return [[cell.strip() for cell in row.strip("│ ").split("│")] for row in rows]


@pytest.mark.parametrize("more", [(), ("--base", "mxfp8", "--exclude", "*.layers.0.*")], ids=str)
def test_a_dry_run_says_what_the_run_then_does(
    more: tuple[str, ...], source: Path, tmp_path: Path
) -> None:
    from rich.filesize import decimal

    command = ("quantize", source, tmp_path / "out", "--max-shard-size", "20KB", *more)
    before = everything(tmp_path)
    dry = run(*command, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert everything(tmp_path) == before == {}
    said = table_of(dry.stdout, "Files in")
    layers = "1" if more else "0-1"
    ((*row, nbytes),) = table_of(dry.stdout, "Experts")
    assert row == [layers, "4", "32", "48", "silu", "nvfp4"]
    assert re.search(r"Time: about [\d.]+ s; .* are read and made into files at", dry.stdout)
    assert re.search(r"Memory: .* for \d+ threads", dry.stdout)
    assert run(*command).exit_code == 0
    there = {f.name: f.stat().st_size for f in (tmp_path / "out").iterdir()}
    assert {name for name, *_ in said} == there.keys()
    sizes = {name: size for name, _, size, _ in said if size}
    assert len(sizes) > 3
    assert sizes == {name: decimal(there[name]) for name in sizes}
    report = json.loads((tmp_path / "out" / "nvfp4_moe_report.json").read_text())
    assert nbytes == decimal(sum(layer["bytes_after"] for layer in report["layers"]
                                 if "experts" in layer["prefix"]))  # fmt: skip


def test_a_dry_run_of_what_is_begun(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --resume it says what is left; with --overwrite, what goes; of what is complete, that
    nothing would be done."""
    command = ("quantize", source, tmp_path / "out", "--max-shard-size", "20KB", "--threads", "1")

    def fail(*_: object, **__: object) -> None:
        raise QuantizeError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr("quantize.execute.finish", fail)
        assert run(*command).exit_code == 1
    next((tmp_path / "out").glob("model-00002-*")).unlink()
    before = everything(tmp_path)
    dry = run(*command, "--resume", "--dry-run").stdout
    states = {row[0]: row[3] for row in table_of(dry, "Files in") if row[0].startswith("model-0")}
    assert list(states.values()) == ["there already", "made", "there already"]
    assert everything(tmp_path) == before
    assert run(*command, "--resume").exit_code == 0
    before = everything(tmp_path)
    assert "nothing would be done" in run(*command, "--resume", "--dry-run").stdout
    dry = run(*command, "--overwrite", "--dry-run").stdout
    assert f"{tmp_path / 'out' / 'config.json'}: would be removed" in dry
    assert everything(tmp_path) == before


def test_a_dry_run_is_refused_as_the_run_is(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(code: int, *words: object) -> None:
        before = everything(tmp_path)
        command = ("quantize", source, tmp_path / "out", *words)
        said = refusal(*command, "--dry-run", code=code)
        assert everything(tmp_path) == before
        assert said == refusal(*command, code=code)

    refused(1, "--include", "nothing")
    refused(2, "--overwrite", "--resume")
    full = shutil._ntuple_diskusage(10, 10, 0)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: full)
        refused(1)
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "mine.txt").write_text("")
    refused(1)


SIZE = ("--calibration-rows", "4", "--calibration-length", "64", "--include", "*.layers.[13].*")


@pytest.mark.parametrize(
    "more", [("--rounding", "gptq"), ("--bits", "5", "--rounding", "gptq")], ids=str
)
def test_a_dry_run_of_a_calibration(more: tuple[str, ...], trained: Path, tmp_path: Path) -> None:
    """Time, memory and disk, though nothing is run."""
    text = tmp_path / "a.txt"
    text.write_text("".join(f"x{n} = {n}\n" for n in range(999)))
    before = everything(tmp_path)
    command = ("quantize", trained, tmp_path / "out", "--calibrate", text, *SIZE, *more)
    dry = run(*command, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert everything(tmp_path) == before
    assert re.search(r"Calibration: about .* of memory; .* of hidden states on", dry.stderr)
    assert re.search(r"Calibration: about .* for one of \d+ experts", dry.stderr)
    assert re.search(r"Disk: .* of hidden states in .*/out/.nvfp4_moe/calibration \(", dry.stdout)
    assert re.search(r"Time: about ", dry.stdout)
    measures = re.search(r"Measuring layers' losses for --bits: about .* for one of", dry.stderr)
    assert bool(measures) is ("--bits" in more)
    if "--bits" in more:
        assert re.search(r"--bits 5: layers' formats are known once .* at most ", dry.stderr)


# -- when it is done -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["out", "an out"])
def test_where_the_report_is_and_how_to_serve(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = run("quantize", source, name).stdout.splitlines()
    report = next(line for line in lines if line.startswith("Report: "))
    page, data = re.fullmatch(r"Report: (.*) \(as data: (.*)\)", report).groups()  # type: ignore[union-attr]
    assert Path(page).is_file() and (Path(page).parent / data).is_file()
    quoted = name if name == "out" else f"'{name}'"
    assert lines[-1] == f"Serve:  vllm serve {quoted} --quantization nvfp4_moe"


# -- Ctrl-C and SIGTERM ----------------------------------------------------------------------------

STOPPED = """
import os, signal, sys
which, moment, *words = sys.argv[1:]

def stop():
    os.kill(os.getpid(), getattr(signal, which))

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == moment:
            stop()  # and go on with the import

if moment == "exit":
    import atexit
    atexit.register(stop)
sys.meta_path.insert(0, Finder())
sys.argv = ["nvfp4-moe", *words]
from quantize.cli import main
main()
"""
"""The command, which gets a signal when a module is looked for, or when it is done."""


def stopped(which: str, moment: str, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STOPPED, which, moment, *map(str, words)],
        capture_output=True, text=True, check=False, env=ONE_THREAD,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("which", "moment"),
    [
        ("SIGINT", "typer"),
        ("SIGTERM", "rich.console"),
        ("SIGINT", "torch._C"),
        ("SIGTERM", "transformers"),
    ],
)
def test_stopped_in_the_first_seconds(
    which: str, moment: str, source: Path, tmp_path: Path
) -> None:
    ended = stopped(which, moment, "quantize", source, tmp_path / "out")
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "interrupted: nothing was changed\n"
    assert not (tmp_path / "out").exists()


def test_stopped_when_it_is_done(source: Path, tmp_path: Path) -> None:
    ended = stopped("SIGINT", "exit", "quantize", source, tmp_path / "out")
    assert ended.returncode == 130
    assert ended.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("words", "nth"), [(("inspect", "org/moe"), 1), (("quantize", "org/moe", "out"), 2)]
)
def test_stopped_while_the_hub_keeps_it_waiting(
    words: tuple[str, ...],
    nth: int,
    source: Path,
    tmp_path: Path,
) -> None:
    """A header, then a file of weights, that does not come: nobody waits for it."""
    waiting, over = threading.Event(), threading.Event()
    asked = []

    def before(request: str) -> None:
        if request.startswith("GET") and request.endswith(".safetensors"):
            asked.append(request)
            if len(asked) == nth:
                waiting.set()
                over.wait(60)

    with serving() as hub:
        hub.publish("org/moe", source)
        hub.before = before
        log = [] if words[0] == "inspect" else ["--log-file", "log"]
        process = subprocess.Popen(
            [sys.executable, "-m", "quantize", *words, *log],
            cwd=tmp_path, stderr=subprocess.PIPE, text=True,
            env=ONE_THREAD | environment(hub, tmp_path / "cache"),
        )  # fmt: skip
        try:
            assert waiting.wait(60)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=5)
        finally:
            over.set()
            process.kill()
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted: nothing was changed"
    assert not (tmp_path / "out").exists()
    if log:
        assert logged(tmp_path / "log")[-1] == said.splitlines()[-1]


WAITING = """
import signal, sys, threading, time
from quantize.cli.errors import reporting_errors
from quantize.cli.signals import end_at_once, ending_at_once

how, which = sys.argv[1:]
other = threading.Thread(target=time.sleep, args=(60,), daemon=True)
other.start()
threading.Timer(0.5, signal.pthread_kill, (other.ident, signal.Signals[which])).start()
never = threading.Event()
if how == "the whole process":
    end_at_once()
    never.wait()
with reporting_errors():
    if how == "a download":
        with ending_at_once():
            never.wait()
    never.wait()
"""


@pytest.mark.parametrize("which", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("how", ["the whole process", "a command", "a download"])
def test_a_signal_that_another_thread_gets(how: str, which: str) -> None:
    """As the system pleases: the main thread waits for a lock, and Python's handlers run there."""
    ended = subprocess.run(
        [sys.executable, "-c", WAITING, how, which],
        capture_output=True, text=True, check=False, env=ONE_THREAD, timeout=30,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "interrupted: nothing was changed\n"


IGNORED = """
import os, signal, sys, time
from quantize.cli.errors import reporting_errors

class Destroyed:
    def __del__(self):
        os.kill(os.getpid(), signal.Signals[sys.argv[1]])

with reporting_errors():
    thing = Destroyed()
    del thing
    time.sleep(30)
print("went on")
"""


@pytest.mark.parametrize("which", ["SIGINT", "SIGTERM"])
def test_a_signal_within_a_destructor(which: str) -> None:
    """Python prints and forgets what is raised there, or in a callback of the garbage collector: a
    doctor that was stopped at such a moment went on to its end."""
    ended = subprocess.run(
        [sys.executable, "-c", IGNORED, which],
        capture_output=True, text=True, check=False, env=ONE_THREAD, timeout=60,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "interrupted: nothing was changed\n"


def test_what_ignores_ctrl_c_goes_on_doing_so() -> None:
    """As what a shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ended = stopped("SIGINT", "rich.console", "--version")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("nvfp4-moe ")


def test_the_command_gives_signals_back(source: Path) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    assert run("inspect", source).exit_code == 0
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
