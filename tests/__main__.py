"""``python -m tests``: all tests, in two processes side by side.

Engines and vLLM's loaders are in one of them, and wait more than they compute. The other's output
comes at once, theirs when it has ended.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WITH_VLLM = ("tests/engine", "tests/plugin")


def main() -> int:
    """Run the tests; the result is 0 if all have passed."""
    pytest = [sys.executable, "-m", "pytest"]
    others = [*pytest, *(f"--ignore={folder}" for folder in WITH_VLLM)]
    with tempfile.TemporaryFile() as output:
        with subprocess.Popen(
            [*pytest, *WITH_VLLM], stdout=output, stderr=subprocess.STDOUT, cwd=ROOT
        ) as engines:
            first = subprocess.run(others, cwd=ROOT, check=False).returncode
            second = engines.wait()
        output.seek(0)
        sys.stdout.flush()
        sys.stdout.buffer.write(output.read())
        sys.stdout.flush()
    return first or second


if __name__ == "__main__":
    sys.exit(main())
