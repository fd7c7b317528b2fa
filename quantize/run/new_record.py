"""The record that a run of a plan has, before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantize.checkpoint.identity import identity_of
from quantize.checkpoint.reader import Checkpoint
from quantize.run.finish import shard_stamps, written_names
from quantize.run.plan import Plan
from quantize.run.record import Record
from quantize.run.same_source import already_noted
from quantize.run.stream import streamed


def is_unseen(checkpoint: Checkpoint) -> bool:
    """Whether weights are still on the hub that a run needs here."""
    return not checkpoint.weights.here and not streamed(checkpoint)


def new_record(
    checkpoint: Checkpoint,
    plan: Plan,
    target: Path,
    others: Sequence[str],
    *,
    resume: bool,
    command: str = "",
    work_dir: Path | None = None,
) -> Record:
    """The record of a run that carries out ``plan`` into ``target``; nothing is written.

    Args:
        others: relative paths of files that are copied, see ``companions``.
        resume: the run may go on with another one.

    Raises:
        QuantizeError: if a file of the source cannot be read.
    """
    identity = identity_of(checkpoint)
    of_commit = plan.fingerprint_of_commit(checkpoint, identity)
    if resume and is_unseen(checkpoint):
        identity = already_noted(target, identity)
    return Record(
        target,
        plan.fingerprint(checkpoint, identity),
        command,
        str(checkpoint.folder),
        checkpoint.weights.times(checkpoint.files),
        names=written_names(plan, others),
        shards=shard_stamps(plan),
        settings=plan.settings(checkpoint),
        identity=identity,
        of_commit=of_commit,
        work=work_dir,
    )
