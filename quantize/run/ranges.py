"""The input scales of experts that a pass over text has found, until their weights are written.

Each group of experts has one JSON file, which is written when all its experts have been seen.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.run.files import write_json


class Ranges:
    """The input scales in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_done(self, group: ExpertGroup) -> bool:
        """Whether the input scales of all experts of ``group`` are there."""
        try:
            self.of(group)
        except QuantizeError:
            return False
        return True

    def write(self, group: ExpertGroup, scales: list[tuple[float, float]]) -> None:
        """Keep the input scales of ``group``: for each expert, of gate and up, and of down."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._file(group), {"prefix": group.prefix, "input_scales": scales})

    def of(self, group: ExpertGroup) -> list[tuple[float, float]]:
        """The input scales of ``group``, as they multiply: for each expert, of gate and up, and of
        down.

        Raises:
            QuantizeError: if they are not there, or damaged.
        """
        file = self._file(group)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))["input_scales"]
            scales = [(float(gate_up), float(down)) for gate_up, down in found]
            if len(scales) != group.num_experts:
                raise ValueError(f"input scales of {len(scales)} experts")
            if not all(math.isfinite(x) and x > 0 for pair in scales for x in pair):
                raise ValueError("an input scale that is not positive")
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise QuantizeError(f"{file}: {error}; run the same command with --resume") from error
        return scales

    def _file(self, group: ExpertGroup) -> Path:
        key = f"{group.prefix} {group.first}"  # a prefix may be too long for a file's name
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.ranges.json"
