"""For each finished shard, one file in the record's folder with what its weights lost.

It is written before the shard gets its name, so a shard without it is not finished.
"""

from __future__ import annotations

import json
from pathlib import Path

from quantize.run.files import write_json
from quantize.run.plan import Plan
from quantize.run.weight_error import WeightError, weight_errors

PATTERN = "*.safetensors.json"


class ShardRecords:
    """The files in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, name: str) -> Path:
        """Of the shard ``name``."""
        return self.folder / f"{name}.json"

    def names(self) -> list[str]:
        """The shards that there are records of."""
        return [file.name.removesuffix(".json") for file in self.folder.glob(PATTERN)]

    def save(self, name: str, errors: list[WeightError], partial: Path) -> None:
        """Keep what the weights of shard ``name`` lost.

        Args:
            partial: what the record is called until it is whole.
        """
        # Sorted: the order in which threads finish is chance.
        write_json(self.file(name), sorted(errors), partial)

    def read(self, plan: Plan, shard: int) -> dict[str, WeightError] | None:
        """What the weights of a shard lost, by module path; None if that is not known of each."""
        try:
            text = self.file(plan.file_names[shard]).read_text(encoding="utf-8")
            found = weight_errors(json.loads(text))
        except (OSError, ValueError, TypeError, LookupError):
            return None
        made = [module for job in plan.shards[shard] for module in job.modules]
        return found if sorted(found) == sorted(made) else None
