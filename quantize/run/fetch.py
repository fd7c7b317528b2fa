"""Downloading a source, once its plan is made from its headers and all that comes has room."""

from __future__ import annotations

from pathlib import Path

from quantize.checkpoint.coming import Shown, not_shown
from quantize.checkpoint.companions import companions
from quantize.checkpoint.opened import bring, to_bring
from quantize.checkpoint.reader import Checkpoint
from quantize.run.finish import is_finished, written_names
from quantize.run.leftovers import replaced_by_new
from quantize.run.new_record import new_record
from quantize.run.plan import Plan
from quantize.run.report_files import of_commit
from quantize.run.same_source import check_same_source
from quantize.run.shards import is_complete
from quantize.run.space import check_disks
from quantize.run.target import FOLDER


def fetch(
    checkpoint: Checkpoint,
    plan: Plan,
    target: Path,
    states: int,
    work_dir: Path | None,
    overwrite: bool,
    resume: bool = False,
    final: bool = True,
    dry: bool = False,
    shown: Shown = not_shown,
) -> None:
    """Download the weights of a source on the hub; nothing, if they are here or streamed.

    Args:
        states: bytes of hidden states that calibration will keep.
        work_dir: of ``--work-dir``.
        overwrite: a checkpoint in ``target`` goes.
        resume: an interrupted run in ``target`` goes on; and if it is complete, nothing comes.
        final: ``plan`` is what is carried out, and is not made another one by the weights.
        dry: only see whether there is room.
        shown: shows how much has come.

    Raises:
        QuantizeError: if a disk has no room for the downloads, the output and the states together,
            before the first byte is fetched; if what is in ``target`` is of another commit,
            or was made with other options, likewise; or if the download fails.
    """
    downloads = to_bring(checkpoint)
    if not downloads:
        return
    others = companions(checkpoint.folder)
    if resume:
        record = new_record(checkpoint, plan, target, others, resume=True)
        assert record.identity is not None
        check_same_source(target, record.identity)
        if final and is_finished(record, plan, others, unseen=True):
            return
        # Other options than DST's are refused before hours of download. Whether an interrupted run
        # had others may take weights to know.
        if final and not record.lasts and of_commit(target):
            record.prepare(overwrite, resume)
    output = sum(
        sum(out.nbytes for out in plan.outputs(shard))
        for shard, name in enumerate(plan.file_names)
        if overwrite or not _is_done(target, name, plan, shard)
    )
    output += sum((checkpoint.folder / name).stat().st_size for name in others)
    freed = 0
    if overwrite:
        names = written_names(plan, others)
        freed = replaced_by_new(target, target / FOLDER, names).nbytes(target)
    work = work_dir or target
    check_disks(target, output, freed, work, states, checkpoint.folder, downloads)
    if not dry:
        bring(checkpoint, shown)


def _is_done(target: Path, name: str, plan: Plan, shard: int) -> bool:
    """Whether a shard, or the part that calibration has written, is there already."""
    here = target / name, target / FOLDER / "new" / name, target / FOLDER / f"{name}.rounded"
    return any(is_complete(file, plan.outputs(shard)) for file in here)
