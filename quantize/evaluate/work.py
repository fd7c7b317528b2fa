"""Where an evaluation keeps states, and how far it has come: ``--work-dir`` and ``--resume``."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.calibration.store import Store, states_name
from quantize.checkpoint.json_files import read_json
from quantize.errors import QuantizeError
from quantize.evaluate.depth import Depth
from quantize.evaluate.predictions import Row
from quantize.evaluate.side import Side
from quantize.run.files import sync, write_json
from quantize.run.lock import locked
from quantize.run.work_dir import WorkDir

_PROGRESS = "evaluation.json"
_STATES = "states"


def fingerprint(*what: Any) -> str:
    """Equal for two evaluations only if they give the same numbers."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def work_folder(given: Path | None, beside: Path | None, mark: str, resume: bool) -> Iterator[Path]:
    """A folder for this evaluation alone. It goes at the end, unless that is an interruption and
    the user gave ``--work-dir``.

    Args:
        given: the user's ``--work-dir``.
        beside: without it, a temporary folder is made here, else where the system has its own.
        mark: the evaluation's :func:`fingerprint`.
        resume: an interrupted evaluation's folder may be used.

    Raises:
        QuantizeError: if it cannot be made; if it is in use; or if it is there and ``resume`` was
            not said.
    """
    if given is None:
        with _temporary(beside) as folder:
            yield folder
        return
    work = WorkDir(given, given.expanduser().resolve() / mark)
    work.check()
    if (work.folder / _PROGRESS).exists() and not resume:
        raise QuantizeError(
            f"{work.folder} holds an interrupted evaluation of the same two checkpoints and text; "
            "say --resume to go on with it, or remove the folder"
        )
    work.make()
    with locked(work.folder):
        yield work.folder
        shutil.rmtree(work.folder)


@contextmanager
def _temporary(beside: Path | None) -> Iterator[Path]:
    """A temporary folder in ``beside``; else, or if that takes none, where the system has its
    own."""
    prefix = ".nvfp4_moe-evaluate-"
    try:
        made = Path(tempfile.mkdtemp(prefix=prefix, dir=beside))
    except OSError:
        made = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@dataclass
class Progress:
    """How far an evaluation has come, in a file.

    Attributes:
        folder: where the file and the states are.
        depth: of the layers that are done.
        rows: that are compared.
        seconds: that an earlier run took.
    """

    folder: Path
    depth: list[Depth] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    seconds: float = 0.0

    def store(self, name: str) -> Store:
        """Where one of the models' states are."""
        return Store(self.folder / _STATES / name)

    @property
    def begun(self) -> bool:
        """Whether an earlier run has left something."""
        return (self.folder / _PROGRESS).exists()

    def resume(self, sides: tuple[Side, Side]) -> None:
        """Go on where an earlier run stopped, if what it left is whole; else begin."""
        if self.begun:
            found = read_json(self.folder / _PROGRESS)
            done = len(found["depth"])
            names = [side.store.names(states_name(done)) for side in sides]
            whole = all(
                own and all(side.store.is_whole(name) for name in own)
                for side, own in zip(sides, names, strict=True)
            )
            if whole:
                self.depth = [Depth(**each) for each in found["depth"]]
                self.rows = [Row(**each) for each in found["rows"]]
                self.seconds = found["seconds"]
                for side, forms in zip(sides, found["return_forms"], strict=True):
                    side.model.return_forms = {int(layer): form for layer, form in forms.items()}
        for side in sides:
            side.store.remove_all_but([states_name(len(self.depth))] if self.depth else [])

    def write(self, sides: tuple[Side, Side], seconds: float) -> None:
        """Record what is done; states that it rests on are on the disk before."""
        if not self.rows:
            for side in sides:
                for name in side.store.names(states_name(len(self.depth))):
                    sync(side.store.folder / name)
        write_json(
            self.folder / _PROGRESS,
            {
                "depth": [each._asdict() for each in self.depth],
                "rows": [each._asdict() for each in self.rows],
                "seconds": seconds,
                "return_forms": [
                    {str(layer): form for layer, form in side.model.return_forms.items()}
                    for side in sides
                ],
            },
        )
