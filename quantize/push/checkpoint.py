"""What there is to upload: a checkpoint that a run has finished."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.checkpoint.hub import CONFIG
from quantize.checkpoint.identity import file_digest
from quantize.checkpoint.json_files import read_json
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.gates import KEY
from quantize.report import RunReport, loads
from quantize.run.made import FIELD
from quantize.run.report_files import REPORT, REPORT_DATA
from quantize.run.target import FOLDER

CARD = "README.md"
WRITTEN_ANEW = (REPORT, REPORT_DATA, CARD)
"""What is not uploaded as it is here: the report names folders, and SRC's card becomes a part of
the new one."""


@dataclass(frozen=True)
class Finished:
    """A finished checkpoint.

    Attributes:
        folder: where it is.
        config: its ``config.json``.
        report: of the run that made it.
    """

    folder: Path
    config: dict[str, Any]
    report: RunReport

    @property
    def files(self) -> list[str]:
        """Relative paths of what is uploaded as it is."""
        return uploaded(self.report.files)

    @property
    def made(self) -> dict[str, Any]:
        """How it was made, as ``config.json`` has it."""
        found: dict[str, Any] = self.config[KEY][FIELD]
        return found

    @property
    def base(self) -> tuple[str, str] | None:
        """Name and commit of the model on the hub that it was made of; None if not known."""
        name, _, commit = str(self.made.get("revision") or "").rpartition("@")
        return (name, commit) if name else None

    def is_made_by(self, command: str) -> bool:
        """Whether a command line says the same, but for where the output comes and how the names of
        folders are written."""
        ours, theirs = shlex.split(self.report.command), shlex.split(command)
        if len(ours) < 4 or len(theirs) < 4:
            return False
        same = ours[2] == theirs[2] or Path(ours[2]).absolute() == Path(theirs[2]).absolute()
        return same and ours[4:] == theirs[4:]


def finished(folder: Path) -> Finished | None:
    """The checkpoint in ``folder``; None if a run has not finished one there.

    Raises:
        QuantizeError: if it was finished, and something of it is missing, damaged or edited since.
    """
    if not (folder / CONFIG).is_file() or (folder / FOLDER / "run.json").exists():
        return None
    config = read_json(folder / CONFIG)
    contract = config.get(KEY)
    if not isinstance(contract, dict) or not isinstance(contract.get(FIELD), dict):
        return None
    if not (folder / REPORT_DATA).is_file():
        return None
    found = Finished(folder, config, _report(folder / REPORT_DATA))
    with Checkpoint(folder, decode=False):  # headers, index and sizes fit together
        pass
    for name in found.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise QuantizeError(f"{folder / REPORT_DATA}: {name!r} is no path within the folder")
        if not (folder / name).is_file():
            raise QuantizeError(f"{folder / name} is missing, which the run wrote; quantize again")
    _check_unchanged(found)
    return found


def _check_unchanged(found: Finished) -> None:
    """Raise QuantizeError if a file that people edit is not as the run wrote it: the report that
    goes with it to the hub says how it was."""
    for name, digest in found.report.digests.items():
        file = found.folder / name
        if name in found.files and file_digest(file) != digest:
            again = "quantize again" if name == CONFIG else "copy SRC's again"
            raise QuantizeError(
                f"{file} was changed since it was written, and `verify` would refuse what is "
                f"uploaded; {again}, and edit it on the hub"
            )


def _report(file: Path) -> RunReport:
    try:
        return loads(file.read_bytes())
    except QuantizeError as error:
        raise QuantizeError(f"{file}: {error}; or quantize again, by --overwrite") from error


def uploaded(names: list[str]) -> list[str]:
    """Which of the files that a run writes are uploaded as they are."""
    return [name for name in names if name not in WRITTEN_ANEW]
