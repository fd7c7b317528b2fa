"""Folders and runs for the tests of what is the user's: files in a target and in a source."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from quantize.calibration.samples import digest_of
from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan
from tests.quantize import checkpoints, processes

Folders = Callable[[str], Path]

SIZE = ("--max-shard-size", "12KB")
KILLED = -signal.SIGKILL


def others_checkpoint(folder: Path, saved: Folders) -> Path:
    """A checkpoint that no run of this package wrote, in several files, among other files."""
    tensors = load_file(saved("mixtral") / "model.safetensors")
    config = json.loads((saved("mixtral") / "config.json").read_text())
    checkpoints.save(folder, tensors, config, lambda name: len(name) % 3)
    (folder / "chat_template.jinja").write_text("old {{ messages }}")
    (folder / "vocab.json").write_text('{"old": 1}')
    (folder / "my_lora.safetensors").write_bytes(b"mine")
    (folder / "notes.txt").write_text("mine")
    (folder / "experiments").mkdir()
    (folder / "experiments" / "model.safetensors").write_bytes(b"mine too")
    return folder


MINE = {
    "my_lora.safetensors": b"mine",
    "notes.txt": b"mine",
    "experiments/model.safetensors": b"mine too",
}


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below ``folder``; of a link, where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.fsencode(path.readlink())
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def calibration(source: Path, rows: torch.Tensor, method: str = "gptq") -> Any:
    """A plan with calibration, and its tokens."""
    settings = Calibration("text", *rows.shape, digest_of(rows), method)
    return Options(max_shard_size=12_000, calibration=settings)


def calibrate(source: Path, out: Path, method: str = "gptq", **more: Any) -> None:
    rows = torch.randint(1, 16, (4, 64), generator=torch.Generator().manual_seed(0))
    with Checkpoint(source) as checkpoint:
        steps = plan(checkpoint, calibration(source, rows, method))
        execute(checkpoint, steps, out, samples=rows, **more)


def interrupted(source: Path, tmp_path: Path) -> Path:
    """A run that was killed when some of its shards were done."""
    words = ("quantize", source, "out", "--max-shard-size", "5KB", "--threads", "1", "--resume")
    moment = 60
    while not list((tmp_path / "out").glob("*.safetensors")):
        killed = processes.run(tmp_path, *words, at=moment)
        assert killed.code == KILLED, killed.output
        moment += 15
    return tmp_path / "out"
