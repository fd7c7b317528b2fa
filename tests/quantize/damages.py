"""Good checkpoints, and what one damages of them and mends again, for the tests of ``verify``."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from quantize.calibration.samples import digest_of
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.execute import execute
from quantize.experts.gates import Gate
from quantize.report import loads, render
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan
from quantize.verify import verify
from tests.quantize import checkpoints, reference

VARIANTS: dict[str, dict[str, Any]] = {
    "modelopt": {},
    "nvfp4": {"activations": True, "exclude": ("*.layers.0.*",)},
    "compressed-tensors": {"layout": "compressed-tensors", "activations": True},
    "sharded": {"max_shard_size": 12_000, "scales": "max", "linears": True},
    "calibrated": {"activations": True, "calibration": "gptq"},
    "two-sided": {"activations": True, "calibration": "two-sided"},
}
MORE: dict[str, dict[str, Any]] = {"weights only": {"layout": "compressed-tensors"}}
DATA, PAGE = "nvfp4_moe_report.json", "nvfp4_moe_report.html"


class Good(NamedTuple):
    """A good checkpoint, and the folder in which one copy of it is damaged and mended again."""

    source: Checkpoint
    folder: Path
    calibrated: bool
    tensors: dict[str, reference.Raw]
    weights: dict[str, reference.Raw]


def write_source(folder: Path) -> Path:
    """A tiny model with files beside it, in ``folder``."""
    checkpoints.build("qwen3_moe").save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("Do as you please.")
    return folder


@contextmanager
def good_checkpoints(folder: Path) -> Iterator[Callable[[str], Good]]:
    """``get(name)``: a good checkpoint, made in ``folder`` with the options of that name."""
    made: dict[str, Good] = {}
    source = write_source(folder / "source")

    def get(name: str) -> Good:
        if name not in made:
            options = dict((VARIANTS | MORE)[name])
            rows = torch.randint(0, 32, (8, 32), generator=torch.Generator().manual_seed(0))
            method = options.pop("calibration", None)
            if method:
                options["calibration"] = Calibration(
                    "t", *rows.shape, digest_of(rows), method=method
                )
            target = folder / name
            checkpoint = Checkpoint(source)
            steps = plan(checkpoint, Options(**options))
            execute(checkpoint, steps, target, samples=rows if method else None)
            made[name] = Good(
                checkpoint,
                target,
                method is not None,
                reference.read_folder(target),
                reference.read_folder(source),
            )
        return made[name]

    yield get
    for each in made.values():
        each.source.__exit__()


def problems(good: Good, alone: bool = False) -> list[str]:
    try:
        with Checkpoint(good.folder, decode=False) as target:
            return verify(None if alone else good.source, target, Gate("silu")).problems
    except QuantizeError as error:  # the command prints it and ends with 1, too
        return [str(error)]


def with_tensors(
    good: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], object]
) -> Path:
    """A copy of a checkpoint of one file in ``folder``, whose tensors ``change`` has changed."""
    shutil.copytree(good, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_config(good: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """The same with its config."""
    shutil.copytree(good, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@contextmanager
def damaged(folder: Path, name: str, content: bytes | None) -> Iterator[None]:
    """A file with other content, or without it no file at all, until the context ends."""
    file = folder / name
    before = file.read_bytes() if file.exists() else None
    try:
        file.unlink(missing_ok=True) if content is None else file.write_bytes(content)
        yield
    finally:
        file.unlink(missing_ok=True) if before is None else file.write_bytes(before)


class Damage(NamedTuple):
    """One damage: the file, what it holds then, and in which way of ``UNSEEN`` it may be missed.

    With ``follows``, the report's digest of the file and the page are made to agree with it.
    """

    file: str
    content: bytes | None
    what: str
    unseen: str | None = None
    follows: bool = False


def following(folder: Path, damage: Damage) -> dict[str, bytes | None]:
    """All files of a damage, with what they hold then."""
    files: dict[str, bytes | None] = {damage.file: damage.content}
    if damage.follows:
        assert damage.content is not None
        report = json.loads(damage.content if damage.file == DATA else (folder / DATA).read_text())
        if damage.file != DATA:
            report["digests"][damage.file] = hashlib.sha256(damage.content).hexdigest()
        files[DATA] = compact(report)
        files[PAGE] = render(loads(compact(report))).encode()
    return files


def compact(report: Any) -> bytes:
    """JSON as the report's is written."""
    return json.dumps(report, separators=(",", ":")).encode() + b"\n"


def indented(value: Any) -> bytes:
    """JSON as other files are written."""
    return json.dumps(value, indent=2).encode() + b"\n"


def remade(good: Good, change: Callable[[dict[str, Any]], Any]) -> Damage:
    report = json.loads((good.folder / DATA).read_text())
    change(report)
    return Damage(DATA, compact(report), "", follows=True)
