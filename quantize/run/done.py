"""Which shards of a run are done, and which of those are void because the source has changed."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.run.plan import Plan
from quantize.run.record import Record
from quantize.run.shards import is_complete
from quantize.run.staged import Shard, Staged
from quantize.run.weight_error import WeightError


def staged_of(record: Record, plan: Plan, folder: Path | None = None) -> Staged:
    """What calibration leaves of a run: experts in its shards, and files in a folder.

    Args:
        folder: by default the record's.
    """
    shards = [
        Shard(
            [module for job in plan.shards[number] for module in job.modules],
            plan.outputs(number),
            record.rounded(name),
            partial(is_done, record, plan, number),
        )
        for number, name in enumerate(plan.file_names)
        if plan.rounds
    ]
    return Staged(folder or record.calibration, shards, plan.groups)


def is_done(record: Record, plan: Plan, shard: int) -> bool:
    """Whether a shard is there, with the record of what its weights lost."""
    return (
        is_complete(record.place(plan.file_names[shard]), plan.outputs(shard))
        and record.shard_records.read(plan, shard) is not None
    )


def missing(record: Record, plan: Plan) -> list[int]:
    """The shards that are still to be made."""
    return [shard for shard in range(len(plan.shards)) if not is_done(record, plan, shard)]


def voided(record: Record, checkpoint: Checkpoint, plan: Plan) -> list[int]:
    """The shards made from files of the source that have changed since, a repaired one for
    example; with calibration all, since each layer rests on those before it."""
    if not record.changed and not record.repaired:
        return []
    names = record.repaired | {
        name
        for name, info in checkpoint.stored.items()
        if str(info.file.resolve()) in record.changed
    }
    return [
        shard
        for shard in range(len(plan.shards))
        if plan.options.calibration or names & plan.reads(checkpoint, shard)
    ]


def discard_changed(record: Record, checkpoint: Checkpoint, plan: Plan) -> None:
    """Remove what is void (see :func:`voided`)."""
    if not record.changed and not record.repaired:
        return
    calibration = record.calibration
    for file in calibration.iterdir() if calibration.exists() else ():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    for shard in voided(record, checkpoint, plan):
        record.shard_records.file(plan.file_names[shard]).unlink(missing_ok=True)
        record.place(plan.file_names[shard]).unlink(missing_ok=True)
        record.rounded(plan.file_names[shard]).unlink(missing_ok=True)
    record.write()


def errors(record: Record, plan: Plan) -> dict[str, WeightError]:
    """What all weights lost, by module path; for a run that misses nothing.

    Raises:
        QuantizeError: if that is not known of a shard.
    """
    every: dict[str, WeightError] = {}
    for shard, name in enumerate(plan.file_names):
        found = record.shard_records.read(plan, shard)
        if found is None:
            raise QuantizeError(
                f"{record.shard_records.file(name)} was changed; pass --resume to repair it"
            )
        every.update(found)
    return every
