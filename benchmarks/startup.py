"""How long ``nvfp4-moe`` takes beside its imports, for a MiniMax-M3 of true size.

    python -m benchmarks.startup FOLDER [--runs 3]

Makes the checkpoint in FOLDER if it is not there: 59 files with headers, and holes for the weights,
5 MB on the disk for 850 GB. Prints CPU seconds (the clock of a busy machine says little), of whole
processes: one that only imports PyTorch, Transformers and the model's classes; ``inspect`` of the
checkpoint; ``--help``. The least of all runs counts.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.m3_checkpoint import Model
from quantize.checkpoint.json_files import INDEX
from quantize.checkpoint.tensors import TensorInfo
from quantize.run.files import write_json
from quantize.run.shards import header

FILES = 59
IMPORTS = """
import torch
from transformers.models.auto import modeling_auto
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl
"""


def write_sparse(folder: Path) -> None:
    """MiniMax-M3's tensors in ``FILES`` files without data; ``config.json`` comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    model = Model(layers=57, heads=64, vocabulary=200064)
    tensors = list(model.tensors())
    total = sum(tensor.nbytes for tensor in tensors)
    files: list[list[TensorInfo]] = [[] for _ in range(FILES)]
    done = 0
    for tensor in tensors:
        files[done * FILES // total].append(tensor)
        done += tensor.nbytes
    weight_map = {}
    for number, inside in enumerate(files, 1):
        name = f"model-{number:05d}-of-{FILES:05d}.safetensors"
        first = header(inside)
        with (folder / name).open("wb") as file:
            file.write(first)
            file.truncate(len(first) + sum(tensor.nbytes for tensor in inside))
        weight_map |= {tensor.name: name for tensor in inside}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", model.config())


def cpu_seconds(*words: str) -> float:
    """CPU seconds of a process of this interpreter."""
    before = os.times()
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    if not (args.folder / "config.json").exists():
        write_sparse(args.folder)
    commands = {
        "imports alone": ("-c", IMPORTS),
        "inspect": ("-m", "quantize", "inspect", str(args.folder)),
        "--help": ("-m", "quantize", "--help"),
    }
    least = {name: float("inf") for name in commands}
    for _ in range(args.runs):  # in turn, so that whatever else the machine does meets all
        for name, words in commands.items():
            least[name] = min(least[name], cpu_seconds(*words))
    for name, seconds in least.items():
        print(f"{name:14s} {seconds:5.2f} CPU-s")


if __name__ == "__main__":
    main()
