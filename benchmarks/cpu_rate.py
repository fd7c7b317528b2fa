"""Token rate on this CPU: NVFP4 through this package beside vLLM's own bf16, in one run.

    python -m benchmarks.cpu_rate                  a part of MiniMax-M3's layer, at its true size
    python -m benchmarks.cpu_rate CHECKPOINT       and an engine: a MiniMax-M3 in Transformers'
                                                   layout, such as m3-nano

The layer is timed by ``benchmarks.moe_layer``. It has 16 of 128 experts and SiLU, which is all that
vLLM's bf16 experts apply on a CPU. Beside the times are the figures by which others describe their
CPU kernels: the bytes of weights that are read a second, what share that is of what the same
threads can read, and by arithmetic the tokens a second that the routed experts of as many such
layers as MiniMax-M3 has would allow. With all 128 experts it is less from a few tokens on: 16 read
51 of them.

Engines take turns in one process (``benchmarks.turns``): vLLM's in bf16, ours, and ours with
experts that do nothing, which has the highest ratio that any kernel could have.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import moe_layer, turns
from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.plan import plan
from vllm_nvfp4_moe.doctor import rates

SHAPE, LAYERS = "minimax-m3-16", 57
TOKENS = (1, 2, 4, 16, 64, 512)
BITS = 4.5


def layer(work: Path) -> Table:
    """The times of a layer, as a table."""
    read = rates.measure(torch.device("cpu"), 4 << 30)
    out = work / "layer.json"
    moe_layer.main(
        [
            *("--device", "cpu", "--shapes", SHAPE, "--tp", "1", "--out", str(out)),
            *("--bandwidth", str(read["read_tb_s"]), "--flops", str(read["tflops"])),
            *("--tokens", *map(str, TOKENS)),
        ]
    )
    (saved,) = json.loads(out.read_text())["shapes"]
    shape = saved["shape"]
    expert = 3 * shape["hidden"] * shape["intermediate"] * BITS / 8
    table = Table(
        "tokens", "experts", "NVFP4, ms", "bf16 (vLLM), ms", "ratio", "weights read, GB/s",
        f"of {1e3 * read['read_tb_s']:.0f} GB/s", f"tokens/s, {LAYERS} layers",
    )  # fmt: skip
    for row in saved["rows"]:
        ours, theirs = row["ms"]["ours"], row["ms"]["bf16"]
        speed = row["active"] * expert / ours / 1e6
        table.add_row(
            str(row["tokens"]), f"{row['active']:.0f}", f"{ours:.3g}", f"{theirs:.3g}",
            f"{theirs / ours:.2f}", f"{speed:.3g}", f"{speed / read['read_tb_s'] / 1e3:.2f}",
            f"{row['tokens'] / ours / LAYERS * 1e3:.3g}",
        )  # fmt: skip
    return table


def engine(source: Path, work: Path) -> Table:
    """The rates of engines, as a table."""
    target = work / "nvfp4"
    with Checkpoint(source) as checkpoint:
        execute(checkpoint, plan(checkpoint), target)
    models = {"bf16": source, "nvfp4": target, "nothing": target}
    command = [sys.executable, "-m", "benchmarks.turns", *(f"{k}={m}" for k, m in models.items())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
    table = Table("tokens/s", "bf16 (vLLM)", "NVFP4", "ratio", "nothing", "highest ratio")
    for batch in map(str, turns.BATCHES):
        rates = {kind: statistics.median(one[batch]) for kind, one in found.items()}
        after, most = (turns.ratio(found, kind, batch) for kind in ("nvfp4", "nothing"))
        table.add_row(
            f"{batch} request{'s' * (batch != '1')}", f"{rates['bf16']:.0f}",
            f"{rates['nvfp4']:.0f}", f"{after:.2f}", f"{rates['nothing']:.0f}", f"{most:.2f}",
        )  # fmt: skip
    perplexities = [str(found[kind]["perplexity"]) for kind in ("bf16", "nvfp4")]
    table.add_row("perplexity", *perplexities, "", "", "")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Console().print(layer(Path(folder)))
        if asked.checkpoint:
            Console().print(engine(asked.checkpoint, Path(folder)))


if __name__ == "__main__":
    main()
