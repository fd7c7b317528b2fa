"""``--work-dir``: calibration's large files on another disk than the target's."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from quantize.errors import QuantizeError
from quantize.run.target import check_links, check_writable


class WorkDir:
    """A run's own folder in one that a user gave.

    Args:
        given: the user's folder; is made if it is not there.
        target: the run's target, from which the name of its own folder follows.

    Attributes:
        given: as an absolute path.
        folder: the run's own. Nothing else in ``given`` is touched.
    """

    def __init__(self, given: Path, target: Path) -> None:
        self.given = given.expanduser().resolve()
        name = hashlib.sha256(os.fsencode(target.resolve())).hexdigest()[:16]
        self.folder = self.given / f"nvfp4_moe-{name}"

    def check(self) -> None:
        """Whether the folder may be used; nothing is changed.

        Raises:
            QuantizeError: if it is a link, holds links, is another user's, or takes no files.
        """
        if self.given.exists() and not self.given.is_dir():
            raise QuantizeError(f"--work-dir {self.given} is a file; give a folder")
        check_writable(self.given, "--work-dir")
        if not os.path.lexists(self.folder):
            return
        if self.folder.is_symlink() or not self.folder.is_dir():
            raise QuantizeError(f"{self.folder} is no folder of a run's; remove it")
        if self.folder.stat().st_uid != os.geteuid():
            raise QuantizeError(f"{self.folder} belongs to another user; give another --work-dir")
        check_links(self.folder, ["states"])

    def make(self) -> None:
        """Make it, for this user only."""
        self.given.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def remove(self) -> None:
        """Remove it with all that calibration has left in it.

        Raises:
            QuantizeError: see :meth:`check`.
        """
        self.check()
        if self.folder.exists():
            shutil.rmtree(self.folder)
