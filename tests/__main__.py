"""``python -m tests``: all tests, in groups, two of them at a time.

Each group is a process of pytest. The long ones come first, so that the short ones fill what is
left of the time. Tests that load vLLM into their process are apart from those of ``quantize``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONG = ("tests/quantize", "tests/plugin", "tests/engine")


def last_words(output: str) -> list[str]:
    """The lines of a killed process' output that say what it did: from the test file that it was in
    on, of Python's own dump the thread that was hit."""
    # The last: processes of tests may have died before, as they should.
    before, fatal, dump = output.rpartition("Fatal Python error:")
    lines = (before if fatal else dump).splitlines()[-10:]
    if fatal:
        reason, *threads = dump.split("\n\n")
        hit = [thread for thread in threads if thread.startswith("Current thread")]
        lines += [fatal + reason, *"\n".join(hit).splitlines()]
    return lines[:40]


def side_by_side(*groups: Sequence[str], **environment: str) -> int:
    """Run pytest for each group of arguments that has any, two at a time; 0 if all have passed.

    The first's output comes at once, and that of others when they and the first have ended. Of one
    that was killed, the end tells once more what its last lines were: summaries of others follow
    it, and who reads the end alone of a long log would not see what died.

    Args:
        environment: what is set for all.
    """
    shown, *others = filter(None, groups)
    env = {**os.environ, **environment}
    if others:
        # Threads of both on the same cores would wait for each other in time slices: a sum that
        # takes microseconds took 17 ms. Tests of threads ask for as many as they need.
        share = max(1, len(os.sched_getaffinity(0)) // 2)
        env = {"OMP_NUM_THREADS": str(share), **env}

    def run(arguments: Sequence[str], output: int | None = None) -> int:
        return subprocess.run(
            [sys.executable, "-m", "pytest", *arguments], stdout=output,
            stderr=subprocess.STDOUT if output else None, cwd=ROOT, env=env, check=False,
        ).returncode  # fmt: skip

    def run_behind(arguments: Sequence[str]) -> tuple[int, bytes]:
        with tempfile.TemporaryFile() as output:
            code = run(arguments, output.fileno())
            output.seek(0)
            return code, output.read()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, shown)
        behind = [pool.submit(run_behind, arguments) for arguments in others]
        ended = [(first.result(), b"")]
        for other in behind:
            ended.append(other.result())
            sys.stdout.flush()
            sys.stdout.buffer.write(ended[-1][1])
            sys.stdout.flush()
    codes = [code for code, _ in ended]
    for group, (code, text) in zip((shown, *others), ended, strict=True):
        if code < 0:  # it could not say so itself
            print(f"pytest {' '.join(group)}: killed by {signal.Signals(-code).name}")
            print(*last_words(text.decode(errors="replace")), sep="\n", flush=True)
    return next((code for code in codes if code), 0)


if __name__ == "__main__":
    rest = [f"--ignore={folder}" for folder in LONG]
    sys.exit(side_by_side(*([folder] for folder in LONG), rest))
