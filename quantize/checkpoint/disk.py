"""Errors of the disk that files come to, told from those of the hub and the network, and what a
user can do about them."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from quantize.errors import QuantizeError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_A_DISK = (
    *_FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.EISDIR, errno.ENOTDIR,
    errno.ENOENT, errno.EIO, errno.EFBIG, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE,
)  # fmt: skip
_XET = re.compile(r"\bIO Error: .*\(os error (\d+)\)")
"""So hf_xet says it, by which the hub's client writes large files: a RuntimeError, without path."""


def disk_error(error: BaseException) -> OSError | None:
    """What the disk answered where ``error`` comes from it; None if it is the hub's or the
    network's."""
    if isinstance(error, OSError):
        return error if error.errno in _OF_A_DISK else None
    found = _XET.search(str(error)) if isinstance(error, RuntimeError) else None
    code = int(found[1]) if found else 0
    return OSError(code, os.strerror(code)) if code in _OF_A_DISK else None


def out_of_space(error: BaseException | None) -> bool:
    """Whether a full disk, or a quota that is used up, has brought ``error`` about."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__
    return False


def told(error: OSError, again: str = "go on by the same command with --resume") -> str:
    """The system's words, and what to do if the disk is full.

    Args:
        again: what to do once there is room.
    """
    words = error.strerror or str(error)
    return f"{words}; free some space, then {again}" if error.errno in _FULL else words


def cannot_be_written(folder: Path, what: str, error: OSError) -> QuantizeError:
    """The error that ``folder`` takes no files.

    Args:
        what: the folder's name in the message, such as ``DST``.
    """
    if error.errno in _FULL:
        return QuantizeError(f"{folder}: {told(error)}")
    return QuantizeError(
        f"{folder}: {error.strerror or error}; {what} must be a folder that you can write to: "
        "choose another one, or change its permissions"
    )


def advice_on_cache(error: BaseException) -> str:
    """What to do if the hub's cache could not be written; nothing, if that is not what happened."""
    from huggingface_hub import constants

    found = disk_error(error)
    if found is None:
        return ""
    cache = Path(constants.HF_HUB_CACHE).absolute()
    if isinstance(found.filename, str) and not _beside(Path(found.filename).absolute(), cache):
        return ""  # another file of the client's, such as the one with the token; it is named
    if found.errno in _FULL:
        return f"; the hub's cache is {cache}: free some space there, or set HF_HUB_CACHE"
    return "; set HF_HUB_CACHE to a folder that you can write to"


def _beside(path: Path, cache: Path) -> bool:
    """Whether a path is in the cache, or the cache in it."""
    return path.is_relative_to(cache) or cache.is_relative_to(path)
