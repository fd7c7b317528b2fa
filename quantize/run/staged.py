"""Experts that calibration has rounded: they are written straight into the output's shards.

Their places follow from the plan. So calibration fills a part of each partial shard
(``Record.rounded``), a group of experts after the other. The jobs that make everything else fill
the rest, and finish it. Beside, each group has a JSON file with what the report says of it. That is
written last, once the group's tensors are on the disk, so a group counts as staged only if it is
there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.run.files import sync, write_json
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


class Shard(NamedTuple):
    """One of the output's shards.

    Attributes:
        modules: module paths of the weights that are quantized in it.
        outputs: all its tensors.
        partial: the file until it is complete.
        is_done: whether it is complete, and in its place.
    """

    modules: Sequence[str]
    outputs: Sequence[TensorInfo]
    partial: Path
    is_done: Callable[[], bool]


class Staged:
    """The staged groups of a run.

    Args:
        folder: of the JSON files.
        shards: of the output.
        groups: all that are to be staged.
    """

    def __init__(
        self, folder: Path, shards: Sequence[Shard] = (), groups: Sequence[ExpertGroup] = ()
    ) -> None:
        self.folder = folder
        self._shards = shards
        self._groups = groups
        self._shard_of = {module: n for n, shard in enumerate(shards) for module in shard.modules}
        self._lost: dict[Path, dict[str, list[Any]]] = {}

    def is_done(self, group: ExpertGroup) -> bool:
        """Whether the group's tensors are in their shards, and its findings are there."""
        try:
            found = self.findings(group)
            lost = sorted(entry[0] for entry in found.lost)
        except (QuantizeError, LookupError, TypeError):
            return False
        wanted = sorted(m for expert in range(group.num_experts) for m in group.modules(expert))
        return lost == wanted and all(
            is_complete(shard.partial, shard.outputs) or shard.is_done()
            for shard in map(self._shards.__getitem__, self._numbers(group))
        )

    def writer(self, group: ExpertGroup) -> GroupWriter:
        """A writer for the group's tensors; :meth:`finish` comes after its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._findings(group).unlink(missing_ok=True)
        writers: dict[int, ShardWriter | None] = {}
        for number in self._numbers(group):
            shard = self._shards[number]
            writers[number] = None  # what is in its place already has the same bytes
            if is_complete(shard.partial, shard.outputs) or not shard.is_done():
                if not is_complete(shard.partial, shard.outputs):
                    self._void(number)
                writers[number] = ShardWriter(shard.partial, shard.outputs, shard.partial, True)
        return GroupWriter(self._shard_of, writers)

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
        file = self._findings(group)
        if file not in self._lost:
            self._lost[file] = {entry[0]: entry for entry in self.findings(group).lost}
        return [WeightError(*self._lost[file][module]) for module in modules]

    def _void(self, number: int) -> None:
        """Before a partial shard is begun anew: no group is staged any more that was in it."""
        for group in self._groups:
            if number in self._numbers(group):
                self._findings(group).unlink(missing_ok=True)
        sync(self.folder)

    def _numbers(self, group: ExpertGroup) -> list[int]:
        """The shards that the group's tensors are in."""
        modules = (m for expert in range(group.num_experts) for m in group.modules(expert))
        return sorted({self._shard_of[module] for module in modules})

    def _findings(self, group: ExpertGroup) -> Path:
        key = f"{group.prefix} {group.first}"  # a prefix may be too long for a file's name
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


class GroupWriter:
    """Writes one group's tensors into the partial shards that they are in."""

    def __init__(self, shard_of: dict[str, int], writers: dict[int, ShardWriter | None]) -> None:
        self._shard_of, self._writers = shard_of, writers

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, of the dtype and shape announced for it."""
        writer = self._writers[self._shard_of[name.rpartition(".")[0]]]
        if writer is not None:
            writer.write(name, tensor)

    def finish(self) -> None:
        """Flush everything to the disk."""
        for writer in self._open():
            writer.pause()

    def abort(self) -> None:
        """Stop writing; the group is not staged."""
        for writer in self._open():
            writer.abort()

    def _open(self) -> list[ShardWriter]:
        return [writer for writer in self._writers.values() if writer is not None]
