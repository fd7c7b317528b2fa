"""What tells one checkpoint from another with the same names and shapes, without reading all of it.

A few bytes of every tensor are enough for that: another revision of a model differs in most bytes
of each tensor that it changes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from quantize.checkpoint.companions import companions
from quantize.checkpoint.hub import revision_of
from quantize.checkpoint.json_files import read_json
from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError

_EDGE, _MIDDLE = 512, 1024
"""Bytes that are read at each end of a tensor, and in its middle."""

_CHUNK = 1024
"""Tensors that one thread samples at a time."""

_THREADS = 8
"""On a cold disk, or another machine's, each read waits; so several wait at the same time."""


class Identity(NamedTuple):
    """Digests that tell a checkpoint from another one.

    Attributes:
        files: of each safetensors file's header, size and, in the hub's cache, hash; by its name.
        tensors: of the first, middle and last bytes of each tensor, by its file's and its name;
            nothing yet of tensors that are still on the hub.
        companions: of each copied file's contents, by its relative path.
        revision: the commit on the hub, see ``hub.revision_of``; None if it is not known.
    """

    files: dict[str, str]
    tensors: dict[str, dict[str, str]]
    companions: dict[str, str]
    revision: str | None = None

    @property
    def is_commit(self) -> bool:
        """Whether it is a commit on the hub, as it was downloaded into the hub's cache."""
        return "@" in (self.revision or "")


def identity_of(checkpoint: Checkpoint) -> Identity:
    """The identity of ``checkpoint``; of its weights only a little is read.

    Raises:
        QuantizeError: if a file cannot be read, or ends early.
    """
    tensors: dict[str, dict[str, str]] = {file.name: {} for file in checkpoint.files}
    if checkpoint.weights.here:
        tensors |= tensor_digests(checkpoint.stored.values())
    return Identity(
        {file.name: checkpoint.weights.digest(file) for file in checkpoint.files},
        tensors,
        {name: file_digest(checkpoint.folder / name) for name in companions(checkpoint.folder)},
        revision_of(checkpoint.folder),
    )


def digest_of(identity: Identity) -> str:
    """SHA-256 of an identity, in hexadecimal: the same for a folder in the hub's cache and for a
    copy of it."""
    known = json.dumps([identity.tensors, identity.companions], sort_keys=True)
    return hashlib.sha256(known.encode()).hexdigest()


def read_identity(file: Path) -> Identity | None:
    """The identity in a JSON file; None if the file is not whole."""
    try:
        found = Identity(**read_json(file))
    except (QuantizeError, TypeError):
        return None
    return found if all(isinstance(part, dict) for part in found[:3]) else None


def differences(before: Identity, now: Identity, but: set[str]) -> tuple[set[str], list[str]]:
    """What has changed of a checkpoint.

    Args:
        but: names of files that may have changed.

    Returns:
        the names of tensors in these files that have, and whatever else has, the commit first.
    """
    allowed: set[str] = set()
    others = [
        name
        for name in {**before.companions, **now.companions}
        if before.companions.get(name) != now.companions.get(name)
    ]
    for file, digest in now.files.items():
        old = before.tensors.get(file) or {}
        changed = [name for name, value in now.tensors[file].items() if old.get(name) != value]
        if file in but:
            allowed.update(changed)
        elif changed or before.files.get(file) != digest:
            others += [f"{file}: {name}" for name in changed] or [file]
    if not allowed and before.revision != now.revision:
        commits = f"{before.revision or 'unknown'} to {now.revision or 'unknown'}"
        others.insert(0, f"revision {commits} (--revision)")
    return allowed, others


def tensor_digests(tensors: Iterable[TensorInfo]) -> dict[str, dict[str, str]]:
    """A digest of the first, middle and last bytes of each tensor, by its file's and its name.

    Raises:
        QuantizeError: if a file cannot be read, or ends early.
    """
    files: dict[Path, list[TensorInfo]] = defaultdict(list)
    for info in tensors:
        files[info.file].append(info)
    chunks = [
        infos[start : start + _CHUNK]
        for infos in files.values()
        for start in range(0, len(infos), _CHUNK)
    ]
    found: dict[str, dict[str, str]] = {file.name: {} for file in files}
    with ThreadPoolExecutor(_THREADS, "sample") as pool:
        for chunk, digests in zip(chunks, pool.map(_digests, chunks), strict=True):
            found[chunk[0].file.name].update(digests)
    return found


def file_digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Raises:
        QuantizeError: if it cannot be read.
    """
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise QuantizeError(f"{file}: {error.strerror or error}") from error


def _digests(infos: list[TensorInfo]) -> list[tuple[str, str]]:
    file = infos[0].file
    try:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            return [(info.name, _digest(descriptor, info)) for info in infos]
        finally:
            os.close(descriptor)
    except OSError as error:
        raise QuantizeError(f"{file}: {error.strerror or error}") from error


def _digest(descriptor: int, info: TensorInfo) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for start, count in _places(info.nbytes):
        try:
            data = os.pread(descriptor, count, info.offset + start)
        except OSError as error:
            raise QuantizeError(
                f"{info.file}: cannot read {info.name}: {error.strerror or error}"
            ) from error
        if len(data) < count:
            raise QuantizeError(
                f"{info.file}: ends within {info.name}; it was cut off while being read"
            )
        digest.update(data)
    return digest.hexdigest()


def _places(nbytes: int) -> Iterator[tuple[int, int]]:
    """Offsets and sizes of what is read of a tensor."""
    if nbytes <= 2 * _EDGE + _MIDDLE:
        yield 0, nbytes
        return
    yield 0, _EDGE
    yield (nbytes - _MIDDLE) // 2, _MIDDLE
    yield nbytes - _EDGE, _EDGE
