"""Whether the disks have room for what a run still writes."""

from __future__ import annotations

import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from quantize.errors import QuantizeError
from quantize.run.record import Record


@dataclass(frozen=True)
class Space:
    """What a run still writes.

    Attributes:
        shards: bytes of the checkpoint, in the target.
        calibration: bytes of calibration's files, in ``record.calibration``.
        rounds: calibration writes a part of the shards.
        source: bytes of the source's files that are in the record's folder for a while, beside the
            shards (``stream.bytes_beside``).
    """

    record: Record
    shards: int
    calibration: int
    rounds: bool = False
    source: int = 0

    def check(self) -> None:
        """Count what goes of the old checkpoint as free.

        Raises:
            QuantizeError: if there is not enough space.
        """
        target = self.record.target
        freed = 0 if self.record.cleared else self.record.replaced.nbytes(target)
        output = self.shards + self.source
        check_disks(target, output, freed, self.record.calibration, self.calibration)

    def has_room_to_calibrate(self) -> bool:
        """Whether calibration fits beside an old checkpoint, with the shards that it begins."""
        wanted = self.calibration * self._same_disk + self.shards * self.rounds
        return not wanted or self._fits(wanted)

    def has_room_for_shards(self) -> bool:
        """Whether a new checkpoint fits beside an old one, now that calibration is done; shards
        that it has begun were asked about before."""
        return self.rounds or self._fits(self.shards + self.source)

    def _fits(self, nbytes: int) -> bool:
        return self.record.cleared or nbytes <= free(self.record.target)

    @property
    def _same_disk(self) -> bool:
        return _disk(self.record.target) == _disk(self.record.calibration)


def check_disks(
    target: Path,
    output: int,
    freed: int,
    work: Path,
    calibration: int,
    cache: Path | None = None,
    downloads: int = 0,
) -> None:
    """Whether each disk has room for all that comes onto it.

    Args:
        output: bytes that come into ``target``, after ``freed`` bytes of an old checkpoint have
            gone there.
        calibration: bytes that come into ``work``.
        downloads: bytes that come into ``cache``.

    Raises:
        QuantizeError: naming the first folder whose disk has not.
    """
    wanted: dict[int, int] = defaultdict(int)
    places = [(target, output), (work, calibration), *([(cache, downloads)] if cache else [])]
    for folder, nbytes in places:
        wanted[_disk(folder)] += nbytes
    for folder, nbytes in places:
        disk = _disk(folder)
        more = freed if disk == _disk(target) else 0
        there = free(folder)
        if not nbytes or wanted[disk] <= there + more:
            continue
        replaced = f" (and {decimal(more)} are replaced)" if more else ""
        advice = "free some space or choose another folder"
        if calibration and _disk(work) == disk:
            advice += f", or keep the {decimal(calibration)} of calibration elsewhere with "
            advice += "--work-dir"
        if downloads and cache and _disk(cache) == disk:
            advice += f", or the {decimal(downloads)} of downloads with HF_HUB_CACHE"
            advice += "" if calibration else "; --stream downloads a few files at a time"
        raise QuantizeError(
            f"{folder}: {decimal(wanted[disk])} are still to be written, but its disk has "
            f"{decimal(there)} free{replaced}, {decimal(wanted[disk] - there - more)} too little; "
            f"{advice}"
        )


def _disk(folder: Path) -> int:
    return _existing(folder).stat().st_dev


def free(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
