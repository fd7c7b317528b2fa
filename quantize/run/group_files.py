"""What a pass over text has found of experts: a JSON file for each group, until it is used.

A file is written when all experts of its group have been seen, so what is there is whole.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.run.files import write_json

Found = TypeVar("Found")


class GroupFiles(Generic[Found]):
    """The files in one folder.

    Attributes:
        kind: of the files, in their names.
        key: what is found is called so in them.
    """

    kind: ClassVar[str]
    key: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def parse(self, group: ExpertGroup, value: Any) -> Found:
        """What ``value`` of a file means; raises ValueError, or as Python does, if it is wrong."""
        raise NotImplementedError

    def is_done(self, group: ExpertGroup) -> bool:
        """Whether what is found of ``group`` is there."""
        try:
            self.of(group)
        except QuantizeError:
            return False
        return True

    def write(self, group: ExpertGroup, found: Found) -> None:
        """Keep what is found of ``group``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._file(group), {"prefix": group.prefix, self.key: found})

    def of(self, group: ExpertGroup) -> Found:
        """What is found of ``group``.

        Raises:
            QuantizeError: if it is not there, or damaged.
        """
        file = self._file(group)
        try:
            return self.parse(group, json.loads(file.read_text(encoding="utf-8"))[self.key])
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise QuantizeError(f"{file}: {error}; run the same command with --resume") from error

    def _file(self, group: ExpertGroup) -> Path:
        key = f"{group.prefix} {group.first}"  # a prefix may be too long for a file's name
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.{self.kind}.json"
