"""What of a target's old contents a new checkpoint replaces, and what it leaves alone.

A run removes files that a run of this package recorded (``files`` of the report's data), unless
somebody has edited them since. It removes the weights that the old checkpoint's index names;
without an index ``model.safetensors``, if there is a ``config.json`` beside it. What else an engine
would read together with the new model (another tool's ``config.json``, index, tokenizer and
templates; what was edited) is moved aside into a folder in the target. Everything else stays where
it is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from quantize.checkpoint.companions import TEMPLATES, belongs, belongs_by_config
from quantize.checkpoint.identity import file_digest
from quantize.checkpoint.json_files import INDEX, read_json
from quantize.errors import QuantizeError
from quantize.layouts import config_files
from quantize.run.report_files import REPORT, REPORT_DATA
from quantize.run.target import CONFIG, check_links

_SHARD = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")
"""How this package calls its shards."""

_ASIDE = "replaced"
"""The folder in the target that files are moved to; with a number if there is one already."""


@dataclass(frozen=True)
class Replaced:
    """What goes before a new checkpoint appears.

    Attributes:
        delete, aside: relative paths, with ``/``, of files that are removed, and moved.
        folder: the name of the folder that the latter are moved to.
    """

    delete: tuple[str, ...] = ()
    aside: tuple[str, ...] = ()
    folder: str = _ASIDE

    def nbytes(self, target: Path) -> int:
        """Bytes that removing it frees."""
        return sum(f.stat().st_size for f in map(target.joinpath, self.delete) if f.is_file())

    def clear(self, target: Path) -> None:
        """Remove and move it; what makes the old checkpoint look whole is the first.

        Whatever is gone already is passed over.
        """
        for name in sorted(self.delete + self.aside, key=lambda n: (n != CONFIG, n != INDEX, n)):
            with suppress(FileNotFoundError):
                if name in self.delete:
                    (target / name).unlink()
                else:
                    place = target / self.folder / name
                    if os.path.lexists(place):  # somebody's
                        place = target / free_name(target) / name
                    place.parent.mkdir(parents=True, exist_ok=True)
                    (target / name).replace(place)
        for name in {name.rpartition("/")[0] for name in self.delete + self.aside} - {""}:
            with suppress(OSError):  # not empty
                (target / name).rmdir()


def survey(
    target: Path, new: Sequence[str], left: Iterable[str] = (), named: Iterable[str] = ()
) -> Replaced:
    """What a checkpoint of the files ``new`` replaces in ``target``; nothing is changed.

    Args:
        left: files that an interrupted run has left there, or would have replaced, each proven to
            be what that run wrote or saw.
        named: others that its record names. In the way of new ones they are moved aside.

    Raises:
        QuantizeError: if there are links, or a file has one of the names and is nothing that a run
            replaces.
    """
    check_links_among(target, new)
    delete = {
        name
        for name in left
        if (target / name).is_file() and (may_be_written(name) or name.endswith(".safetensors"))
    }
    recorded = {name: same for name, same in _recorded(target) if (target / name).is_file()}
    delete |= {name for name, same in recorded.items() if same}
    delete |= {name for name in _weights(target) if (target / name).is_file()}
    in_the_way = {name for name in named if name in new and (target / name).is_file()}
    aside = (recorded.keys() | set(_read_with_it(target, new)) | in_the_way) - delete
    for name in new:
        if os.path.lexists(target / name) and name not in delete | aside:
            raise QuantizeError(
                f"{target / name} is there already and is not known to be of the checkpoint that "
                "is replaced; move it away, or choose another folder"
            )
    return Replaced(tuple(sorted(delete)), tuple(sorted(aside)), free_name(target))


def check_links_among(target: Path, new: Iterable[str]) -> None:
    """Raise QuantizeError if there are links in ``target``, where the files ``new`` come."""
    check_links(target, {n.partition("/")[0] for n in new if "/" in n} | {TEMPLATES})


def _recorded(target: Path) -> Iterator[tuple[str, bool]]:
    """Files that a run of this package says it wrote, and whether they are still what it wrote.

    Weights, index and report are taken to be. People edit the others.
    """
    with suppress(QuantizeError):
        report = read_json(target / REPORT_DATA)
        digests = report.get("digests")
        digests = digests if isinstance(digests, dict) else {}
        for name in plain(report.get("files")):
            # Anyone can write such a file: it must not name what no run would write.
            if may_be_written(name):
                ours = name in {INDEX, REPORT, REPORT_DATA, *config_files()}
                same = ours or _SHARD.fullmatch(name) is not None
                yield name, same or _digest(target / name) == digests.get(name)


def may_be_written(name: str) -> bool:
    """Whether a run of this package could have written a file of this relative path."""
    return bool(_SHARD.fullmatch(name)) or _is_read(name) or belongs_by_config(name)


def _digest(file: Path) -> str:
    """SHA-256 of a file; empty if it cannot be read."""
    with suppress(QuantizeError):
        return file_digest(file)
    return ""


def _weights(target: Path) -> Iterator[str]:
    """Weights that the old checkpoint's index names."""
    if os.path.lexists(target / INDEX):
        with suppress(QuantizeError):
            weight_map = read_json(target / INDEX).get("weight_map")
            names = plain(weight_map.values() if isinstance(weight_map, dict) else ())
            yield from {n for n in names if "/" not in n and n.endswith(".safetensors")}
    elif (target / CONFIG).exists():
        yield "model.safetensors"


def _read_with_it(target: Path, new: Sequence[str]) -> Iterator[str]:
    """Files that would be read as the new checkpoint's, or stand in its place."""
    templates = target / TEMPLATES
    for file in target.iterdir():
        if file.is_file() and _is_read(file.name):
            yield file.name
    for file in templates.iterdir() if templates.is_dir() else ():
        if file.is_file():
            yield f"{TEMPLATES}/{file.name}"
    for name in new:
        if ("/" in name or name.endswith(".py")) and (target / name).is_file():
            yield name


def _is_read(name: str) -> bool:
    return name in {CONFIG, INDEX, REPORT, REPORT_DATA, *config_files()} or belongs(name)


def plain(names: Any) -> Iterator[str]:
    """Those of ``names``, which may be anything, that are paths within a folder."""
    for name in names if isinstance(names, Iterable) and not isinstance(names, str) else ():
        if isinstance(name, str) and name and "\0" not in name:
            path = PurePosixPath(name)
            if not path.is_absolute() and ".." not in path.parts and str(path) == name != ".":
                yield name


def free_name(target: Path) -> str:
    """A name for a new folder in ``target`` that files are moved to."""
    number, name = 1, _ASIDE
    while os.path.lexists(target / name):
        number += 1
        name = f"{_ASIDE}-{number}"
    return name
