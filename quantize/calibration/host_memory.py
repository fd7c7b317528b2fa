"""How much memory this process may take of its machine."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

MOUNTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup/memory"))
"""Where control groups are: version 2, version 2 beside version 1, and version 1's of memory."""

MEMBERSHIP = Path("/proc/self/cgroup")

_FILES = ("memory.max", "memory.limit_in_bytes")
_LIMITS = {"RLIMIT_AS": "address space", "RLIMIT_DATA": "data"}


class HostMemory(NamedTuple):
    """Memory that can be had.

    Attributes:
        nbytes: how much.
        why: what says so, for a message; empty if it is all that the machine has.
    """

    nbytes: int
    why: str = ""


def host_memory() -> HostMemory:
    """Return the least of what the machine has, what the process may take (``ulimit -v`` and
    ``-d``), and what its control groups may, as containers and schedulers set them. What others
    use at the moment does not count."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = HostMemory(machine), *_limits(), *_of_groups()
    return min(found, key=lambda each: each.nbytes)


def _limits() -> Iterator[HostMemory]:
    for name, of in _LIMITS.items():
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY:
            yield HostMemory(soft, f"the process's limit of {of}, {name}")


def _of_groups() -> Iterator[HostMemory]:
    """The limits of the process's groups and of those around them, each of which holds. A container
    may see itself at the root of a mount, whatever the group's path is outside."""
    try:
        lines = MEMBERSHIP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number != "0" and "memory" not in controllers.split(","):
            continue
        inner = PurePosixPath(path.lstrip("/"))
        for around in (inner, *inner.parents):
            for file in (mount / around / name for mount in MOUNTS for name in _FILES):
                try:
                    yield HostMemory(int(file.read_text()), f"the limit in {file}")
                except (OSError, ValueError):  # it is not there, or says "max"
                    continue
