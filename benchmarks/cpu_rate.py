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

The bf16 engine needs ``n_group`` and ``topk_group`` set to 1, since vLLM-CPU routes by sigmoid only
in groups; it also applies SiLU in place of the model's gate, which costs it nothing. ``nothing`` is
our engine with experts that do nothing: what the rest of the engine takes, and so the highest ratio
that any kernel could have.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import moe_layer
from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.plan import plan
from vllm_nvfp4_moe.doctor import rates

SHAPE, LAYERS = "minimax-m3-16", 57
TOKENS = (1, 2, 4, 16, 64, 512)
BITS = 4.5

NOTHING = """
import inspect, runpy, sys, torch
import vllm_nvfp4_moe.backends.cpu.method as method
def nothing(x, *args, **more): return torch.zeros_like(x)
nothing.__signature__ = inspect.signature(method.experts_forward)
nothing.__annotations__ = method.experts_forward.__annotations__
method.experts_forward = nothing
runpy.run_module("benchmarks.engine", run_name="__main__", alter_sys=True)
"""
"""``python -c``, and then what ``benchmarks.engine`` takes. One process: workers would not know."""


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


def run(model: Path, *more: str, code: str | None = None, **environment: str) -> dict[str, Any]:
    """``benchmarks.engine --speed`` on ``model``; its JSON line.

    Args:
        code: what runs in the place of that module.
    """
    command = [sys.executable, *(("-c", code) if code else ("-m", "benchmarks.engine"))]
    command += [str(model), "--rows", "6", "--speed", *more]
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    result: dict[str, Any] = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])
    return result


def engine(source: Path, work: Path) -> Table:
    """The rates of engines, as a table."""
    target = work / "nvfp4"
    with Checkpoint(source) as checkpoint:
        execute(checkpoint, plan(checkpoint), target)
    grouped = json.dumps({"hf_overrides": {"n_group": 1, "topk_group": 1}})
    inside = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    ours = ("--quantization", "nvfp4_moe")
    bf16 = run(source, "--engine", grouped, **inside)
    nvfp4 = run(target, *ours, **inside)
    empty = run(target, *ours, code=NOTHING, **inside, NVFP4_MOE_SELF_CHECK="0")
    table = Table("", "bf16 (vLLM)", "NVFP4", "ratio", "nothing", "highest ratio")
    for batch in ("1", "16"):
        before, after, most = (r["tokens_per_second"][batch] for r in (bf16, nvfp4, empty))
        table.add_row(
            f"tokens/s, {batch} request{'s' * (batch != '1')}", f"{before:.0f}", f"{after:.0f}",
            f"{after / before:.2f}", f"{most:.0f}", f"{most / before:.2f}",
        )  # fmt: skip
    table.add_row("perplexity", str(bf16["perplexity"]), str(nvfp4["perplexity"]), "", "", "")
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
