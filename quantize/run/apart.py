"""That a run's source and its target are not in each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError


def check_apart(checkpoint: Checkpoint, target: Path, others: Sequence[str] = ()) -> None:
    """Raise QuantizeError if a run would write to its source, or read its target.

    Args:
        others: relative paths of files that are copied.
    """
    # The files' own folders too: a source may be a folder of links to them.
    source = {checkpoint.folder, *(file.resolve().parent for file in checkpoint.files)}
    inner = {name.rpartition("/")[0] for name in others}
    for place in (target, *(target / folder for folder in inner if folder)):
        if place.exists() and any(folder.samefile(place) for folder in source):
            raise QuantizeError(f"{place} is the source; choose another folder")
    for name in {name.partition("/")[0] for name in others if "/" in name}:
        if target.resolve().is_relative_to((checkpoint.folder / name).resolve()):
            raise QuantizeError(
                f"{target} is in {checkpoint.folder / name}, which is copied; choose another folder"
            )
