"""How much of a download has come: by what lies in the hub's cache, whatever the client tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Event, Thread

Came = Callable[[int], None]
"""Is told how many bytes have come since it was told before."""

Shown = Callable[[int], AbstractContextManager[Came]]
"""Shows a download of so many bytes, while the context lasts."""

_EVERY = 1.0
"""Seconds between two looks."""


def not_shown(_: int) -> AbstractContextManager[Came]:
    """A download that nobody sees."""
    return nullcontext(lambda _: None)


@contextmanager
def counted(
    blobs: Path, sizes: Mapping[str, int], came: Came, every: float = _EVERY
) -> Iterator[None]:
    """Tell ``came`` of what comes of some files, until the context ends; then all has come, unless
    something was raised.

    Args:
        blobs: the folder of the hub's cache where files lie by their hashes; of one that is not
            whole yet, the name begins with the hash and ends with ``.incomplete``.
        sizes: of the files, in bytes, by their hashes.
        every: seconds between two looks.
    """
    before = _parts(blobs)  # of downloads that were killed: a client may go on with them, or not
    told = 0

    def look() -> None:
        nonlocal told
        parts = _parts(blobs)
        there = sum(_there(blobs, digest, size, parts, before) for digest, size in sizes.items())
        if there > told:
            came(there - told)
            told = there

    def watch() -> None:
        while not ended.wait(every):
            look()

    ended = Event()
    thread = Thread(target=watch, name="download's size", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if told < sum(sizes.values()):
        came(sum(sizes.values()) - told)


def _there(
    blobs: Path, digest: str, size: int, parts: Mapping[str, int], before: Mapping[str, int]
) -> int:
    """Bytes of a file that have come."""
    if (blobs / digest).exists():
        return size
    grown = (parts[name] - before.get(name, 0) for name in parts if name.startswith(digest))
    return min(size, max(grown, default=0))


def _parts(blobs: Path) -> dict[str, int]:
    """Bytes on the disk of each file that is not whole, by name; holes are none."""
    found = {}
    for file in blobs.glob("*.incomplete"):
        with suppress(OSError):  # it is whole by now, and has another name
            stat = file.stat()
            found[file.name] = min(stat.st_size, stat.st_blocks * 512)
    return found
