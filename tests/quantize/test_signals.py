"""Ctrl-C and SIGTERM: a command stops at any moment, and says what became of its work."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.hub_server import environment, serving
from tests.quantize.checkpoints import ONE_THREAD
from tests.quantize.test_cli import run
from tests.quantize.unattended import logged, source

__all__ = ["source"]  # a fixture

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
