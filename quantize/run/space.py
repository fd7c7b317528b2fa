"""Whether the disks have room for what a run still writes."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from quantize.errors import QuantizeError
from quantize.run.record import Record


@dataclass(frozen=True)
class Space:
    """What a run still writes.

    Attributes:
        shards: bytes of the checkpoint, in the target.
        calibration: bytes of calibration's files, in ``record.calibration``.
        rounds: calibration writes a part of the shards.
    """

    record: Record
    shards: int
    calibration: int
    rounds: bool = False

    def check(self) -> None:
        """Count what goes of the old checkpoint as free.

        Raises:
            QuantizeError: if there is not enough space.
        """
        target, work = self.record.target, self.record.calibration
        freed = 0 if self.record.cleared else self.record.replaced.nbytes(target)
        here = self.shards + (self.calibration if self._same_disk else 0)
        there = 0 if self._same_disk else self.calibration
        for folder, wanted, room in (
            (target, here, free(target) + freed),
            (work, there, free(work)),
        ):
            if wanted > room:
                replaced = f" (and {freed / 1e9:.1f} GB are replaced)" if freed else ""
                elsewhere = ""
                if self.calibration:
                    elsewhere = f", or keep the {self.calibration / 1e9:.1f} GB of calibration "
                    elsewhere += "elsewhere with --work-dir"
                raise QuantizeError(
                    f"{folder}: {wanted / 1e9:.1f} GB are still to be written, but its disk has "
                    f"{free(folder) / 1e9:.1f} GB free{replaced}; free some space or choose "
                    f"another folder{elsewhere}"
                )

    def has_room_to_calibrate(self) -> bool:
        """Whether calibration fits beside an old checkpoint, with the shards that it begins."""
        wanted = self.calibration * self._same_disk + self.shards * self.rounds
        return not wanted or self._fits(wanted)

    def has_room_for_shards(self) -> bool:
        """Whether a new checkpoint fits beside an old one, now that calibration is done; shards
        that it has begun were asked about before."""
        return self.rounds or self._fits(self.shards)

    def _fits(self, nbytes: int) -> bool:
        return self.record.cleared or nbytes <= free(self.record.target)

    @property
    def _same_disk(self) -> bool:
        target, work = _existing(self.record.target), _existing(self.record.calibration)
        return target.stat().st_dev == work.stat().st_dev


def free(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder
