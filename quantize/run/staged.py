"""Experts that calibration has quantized, until they are copied to the output's shards.

Each group of experts has a safetensors file with the very tensors that the output will hold, and a
JSON file with what the report says of them. The JSON file is written last, so a group counts as
staged only if it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantize.checkpoint.headers import read_header
from quantize.checkpoint.reader import read_fully
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.run.files import write_json
from quantize.run.shards import ShardWriter, is_complete
from quantize.run.weight_error import WeightError


@dataclass
class Findings:
    """What the report says of one group.

    Attributes:
        prefix: the group's module path.
        tokens: how many tokens each expert was given.
        rules: how each expert was quantized: by a rounding, or by a scale rule alone.
        before, after: ``[experts][2]``, the relative errors of the outputs of gate-and-up and of
            down over the calibration tokens: as the scale rule alone would quantize them, and as
            they are staged. NaN where there were no tokens.
        lost: a ``WeightError`` for each module, as a list.
    """

    prefix: str
    tokens: list[int] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    before: list[list[float]] = field(default_factory=list)
    after: list[list[float]] = field(default_factory=list)
    lost: list[list[Any]] = field(default_factory=list)


class Staged:
    """The staged groups in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: dict[Path, dict[str, TensorInfo]] = {}
        self._lost: dict[Path, dict[str, list[Any]]] = {}

    def is_done(self, group: ExpertGroup, outputs: list[TensorInfo]) -> bool:
        """Whether a file of just ``outputs`` is there for the group, with its findings."""
        try:
            found = self.findings(group)
            lost = sorted(entry[0] for entry in found.lost)
        except (QuantizeError, LookupError, TypeError):
            return False
        wanted = sorted(m for expert in range(group.num_experts) for m in group.modules(expert))
        return lost == wanted and is_complete(self._file(group), outputs)

    def writer(self, group: ExpertGroup, outputs: list[TensorInfo]) -> ShardWriter:
        """A writer for the group's tensors; :meth:`finish` comes after its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._findings(group).unlink(missing_ok=True)
        file = self._file(group)
        return ShardWriter(file, outputs, file.with_suffix(".partial"))

    def finish(self, group: ExpertGroup, findings: Findings) -> None:
        """Write the findings; from then on the group is staged."""
        write_json(self._findings(group), asdict(findings))

    def findings(self, group: ExpertGroup) -> Findings:
        """The findings of a staged group.

        Raises:
            QuantizeError: if the group is not staged.
        """
        try:
            return Findings(**json.loads(self._findings(group).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise QuantizeError(
                f"{self._findings(group)}: {error}; run the same command with --resume"
            ) from error

    def lost(self, group: ExpertGroup, modules: tuple[str, ...]) -> list[WeightError]:
        """What quantizing some of the group's modules lost."""
        file = self._file(group)
        if file not in self._lost:
            self._lost[file] = {entry[0]: entry for entry in self.findings(group).lost}
        return [WeightError(*self._lost[file][module]) for module in modules]

    def tensor(self, group: ExpertGroup, name: str) -> torch.Tensor:
        """The bytes of one of the group's tensors, uint8 ``[nbytes]``."""
        file = self._file(group)
        if file not in self._headers:
            self._headers[file] = {info.name: info for info in read_header(file)}
        info = self._headers[file][name]
        buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        descriptor = os.open(file, os.O_RDONLY)
        try:
            read_fully(descriptor, buffer, info)
        finally:
            os.close(descriptor)
        return buffer

    def _file(self, group: ExpertGroup) -> Path:
        key = f"{group.prefix} {group.first}"  # a prefix may be too long for a file's name
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"

    def _findings(self, group: ExpertGroup) -> Path:
        return self._file(group).with_suffix(".json")
