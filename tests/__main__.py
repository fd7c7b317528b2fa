"""``python -m tests``: all tests, in two processes side by side.

Engines and vLLM's loaders are in one of them, and wait more than they compute. The other's output
comes at once, theirs when it has ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITH_VLLM = ("tests/engine", "tests/plugin")


def side_by_side(shown: Sequence[str], behind: Sequence[str], **environment: str) -> int:
    """Run pytest twice at once, with these arguments; the result is 0 if all have passed.

    Args:
        shown: arguments of the one whose output comes at once.
        behind: arguments of the other, whose output comes when both have ended; none: not run.
        environment: what is set for both.
    """
    env = {**os.environ, **environment}
    if behind:
        # Threads of both on the same cores would wait for each other in time slices: a sum that
        # takes microseconds took 17 ms. Tests of threads ask for as many as they need.
        share = max(1, len(os.sched_getaffinity(0)) // 2)
        env = {"OMP_NUM_THREADS": str(share), **env}
    pytest = [sys.executable, "-m", "pytest"]
    if not behind:
        return subprocess.run([*pytest, *shown], cwd=ROOT, env=env, check=False).returncode
    with tempfile.TemporaryFile() as output:
        with subprocess.Popen(
            [*pytest, *behind], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=env
        ) as other:
            first = subprocess.run([*pytest, *shown], cwd=ROOT, env=env, check=False).returncode
            second = other.wait()
        output.seek(0)
        sys.stdout.flush()
        sys.stdout.buffer.write(output.read())
        sys.stdout.flush()
    return first or second


if __name__ == "__main__":
    sys.exit(side_by_side([f"--ignore={folder}" for folder in WITH_VLLM], WITH_VLLM))
