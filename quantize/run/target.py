"""Whether a run may use a folder as its target, as far as can be said without its plan."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from quantize.checkpoint.disk import cannot_be_written
from quantize.errors import QuantizeError

FOLDER = ".nvfp4_moe"
"""The folder in the target that holds a run's record."""

CONFIG = "config.json"


def check_folder(target: Path) -> None:
    """Raise QuantizeError if ``target`` is a file, or holds links or a file where the record's
    folder comes."""
    if target.exists() and not target.is_dir():
        raise QuantizeError(f"{target} is a file; the target must be a folder")
    if (target / FOLDER).is_file():
        raise QuantizeError(
            f"{target / FOLDER} is a file, but a run keeps its record in a folder of that name; "
            "remove it, or choose another folder"
        )
    check_links(target, [FOLDER])


def check_writable(folder: Path, what: str) -> None:
    """See that files can be made in ``folder``, or that it can be made; nothing is left there.

    Permissions do not tell: root has all, but /proc and /sys take no files.

    Args:
        what: the folder's name in the message, such as ``DST``.

    Raises:
        QuantizeError: if they cannot.
    """
    try:
        if os.path.lexists(folder):
            if not os.access(folder, os.W_OK | os.X_OK):
                read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
                code = errno.EROFS if read_only else errno.EACCES
                raise OSError(code, os.strerror(code))
            return
        above = folder.absolute().parent
        while not above.exists():
            above = above.parent
        # Not the folder itself: another run may be about to make it.
        Path(tempfile.mkdtemp(prefix=".nvfp4_moe-", dir=above)).rmdir()
    except OSError as error:
        raise cannot_be_written(folder, what, error) from error


def check_target(target: Path, overwrite: bool, resume: bool) -> None:
    """Whether a run may use the folder ``target``, as far as can be said without its plan.

    Raises:
        QuantizeError: if not.
    """
    check_folder(target)
    if overwrite or is_free(target):
        return
    interrupted = (target / FOLDER / "run.json").exists()
    if resume and (interrupted or (target / CONFIG).exists()):
        return
    if interrupted:
        raise QuantizeError(
            f"{target} holds an interrupted run; pass --resume to go on with it, or --overwrite "
            "to start again"
        )
    if resume:
        raise QuantizeError(
            f"{target} holds no interrupted run ({FOLDER}/run.json): nothing to resume; pass "
            "--overwrite to replace what is there"
        )
    raise QuantizeError(f"{target} is not empty; pass --overwrite to replace its checkpoint")


def is_free(target: Path) -> bool:
    """Whether nothing is there but, at most, what a run killed in its first moments leaves."""
    if not target.exists():
        return True
    names = {file.name for file in target.iterdir()}
    return names <= {FOLDER} and not (target / FOLDER / "run.json").exists()


def check_room_for_names(target: Path, names: Iterable[str]) -> None:
    """Raise QuantizeError if there is a folder where one of the files ``names`` comes, or a file
    where its folder comes. A run moves and removes files, and would fail on these in its end.

    Args:
        names: relative paths, with ``/``.
    """
    for name in names:
        if (target / name).is_dir():
            raise QuantizeError(
                f"{target / name} is a folder, but a file of the checkpoint has that name; move it "
                "away, or choose another folder"
            )
        for above in PurePosixPath(name).parents:
            if (target / above).exists() and not (target / above).is_dir():
                raise QuantizeError(
                    f"{target / above} is a file, but a folder of the checkpoint has that name; "
                    "move it away, or choose another folder"
                )


def check_links(target: Path, folders: Iterable[str] = ()) -> None:
    """Raise QuantizeError if ``target``, or one of these folders in it, holds a link.

    What a link leads to is somebody's, and a run writes, moves and removes files here.
    """
    if not target.is_dir():
        return
    entries = list(target.iterdir())
    for name in folders:
        if not (target / name).is_symlink():
            for where, below, files in os.walk(target / name):
                entries += [Path(where, found) for found in below + files]
    for entry in entries:
        if entry.is_symlink():
            raise QuantizeError(
                f"{entry} is a link to {entry.readlink()}; a run writes and removes only what "
                "is in its target itself; remove the link, or choose another folder"
            )
