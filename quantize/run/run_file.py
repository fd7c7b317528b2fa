"""``run.json``: which run has begun in a target, what it writes there, and what it replaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantize.checkpoint.json_files import read_json
from quantize.run.files import write_json
from quantize.run.replaced import Replaced, plain
from quantize.run.stamps import proven, shard_stamp, stamp

NAME = "run.json"


@dataclass
class RunFile:
    """What the file says. Nobody but a run should have written it, so nothing is taken for granted.

    Attributes:
        fingerprint, settings, command, source, files, names, cleared: see ``Record``.
        replaced: what is replaced. Read from a file, it has only what is proven (``stamps``) to be
            what the run that wrote the file saw.
        damaged: names of the source's files that a run found to be damaged.
        work: the folder of ``--work-dir``; None without.
        stamps: of the files beside the shards that the run has written, or is about to; by name.
        shards: of the shards, likewise.
    """

    fingerprint: str
    settings: str = ""
    command: str = ""
    source: str = ""
    files: dict[str, int] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)
    cleared: bool = True
    replaced: Replaced = field(default_factory=Replaced)
    damaged: set[str] = field(default_factory=set)
    work: str | None = None
    stamps: dict[str, str] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path, target: Path) -> None:
        """Write it to the record's ``folder``, with stamps of what is replaced in ``target``."""
        replaced = {
            "delete": {name: stamp(target / name) for name in self.replaced.delete},
            "aside": {name: stamp(target / name) for name in self.replaced.aside},
            "folder": self.replaced.folder,
        }
        value = vars(self) | {"replaced": replaced, "damaged": sorted(self.damaged)}
        write_json(folder / NAME, value)

    def written(self, target: Path) -> set[str]:
        """The files in ``target`` that are proven to be the run's."""
        return {*proven(target, self.shards, shard_stamp), *proven(target, self.stamps)}

    @classmethod
    def read(cls, folder: Path, target: Path) -> RunFile:
        """Read it.

        Raises:
            QuantizeError: if it is not there, or no JSON object.
        """
        found = read_json(folder / NAME)
        said, work = _object(found.get("replaced")), found.get("work")
        delete, aside = (
            tuple(proven(target, _stamps(said.get(key)))) for key in ("delete", "aside")
        )
        name = said.get("folder")
        return cls(
            str(found.get("fingerprint")),
            str(found.get("settings")),
            str(found.get("command", "")),
            str(found.get("source", "")),
            _object(found.get("files")),
            list(plain(found.get("names"))),
            found.get("cleared") is not False,
            Replaced(delete, aside, *plain([name] if isinstance(name, str) else [])),
            set(plain(found.get("damaged"))),
            work if isinstance(work, str) else None,
            _stamps(found.get("stamps")),
            _stamps(found.get("shards")),
        )


def _object(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _stamps(value: Any) -> dict[str, str]:
    """Stamps by name, of names that are paths within a folder."""
    found = _object(value)
    return {name: str(found[name]) for name in plain(found)}
