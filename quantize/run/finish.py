"""Finishing a target whose shards are there: other files, index, and ``config.json`` as the last.

Until ``config.json`` is there, no engine takes the folder for a checkpoint.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantize.checkpoint.descriptions import without_descriptions
from quantize.checkpoint.disk import told
from quantize.checkpoint.hub import revision_of
from quantize.checkpoint.identity import Identity
from quantize.checkpoint.json_files import INDEX
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.gates import KEY, to_contract
from quantize.run import report_files
from quantize.run.files import json_bytes, replacing
from quantize.run.made import FIELD, record_of
from quantize.run.plan import Plan
from quantize.run.record import Record
from quantize.run.report_files import REPORT, REPORT_DATA
from quantize.run.shards import header, is_complete
from quantize.run.stamps import shard_stamp_of, stamp, stamp_of
from quantize.run.target import CONFIG


def finish(
    checkpoint: Checkpoint,
    plan: Plan,
    record: Record,
    others: Sequence[str],
    reports: Mapping[str, bytes],
) -> None:
    """Make the target of ``record`` a checkpoint, and end the record.

    Args:
        others: relative paths of files that are copied, see ``companions``.
        reports: contents of the report's files by name.

    Raises:
        QuantizeError: if a file cannot be copied, or another run has taken the target over.
    """
    record.check_ours()
    target, partial = record.target, record.partial("other")
    copied = {name: checkpoint.folder / name for name in others}
    config = json_bytes(config_of(checkpoint, plan))
    made = {n: json_bytes(v) for n, v in plan.layout.extra_files(plan.ignore, plan.beside).items()}
    made |= reports
    if INDEX in record.names:
        made[INDEX] = json_bytes(_index(plan))
    stamps = {name: stamp(file) for name, file in copied.items()}
    record.announce(stamps | {n: stamp_of(c) for n, c in (made | {CONFIG: config}).items()})
    for name, file in copied.items():
        place = record.place(name)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as original, replacing(place, partial) as copy:
                shutil.copyfileobj(original, copy)
        except OSError as error:
            raise QuantizeError(
                f"{checkpoint.folder / name} cannot be copied to {target}: {told(error)}"
            ) from error
    for name, content in made.items():
        _write(record.place(name), content, partial)
    record.publish(lambda place: _write(place, config, partial))


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {
        out.name: name for i, name in enumerate(plan.file_names) for out in plan.outputs(i)
    }
    return {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}


def _write(place: Path, content: bytes, partial: Path) -> None:
    with replacing(place, partial) as file:
        file.write(content)


def config_of(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """The target's ``config.json``."""
    return without_descriptions(checkpoint.config) | {
        KEY: to_contract(plan.gates.concatenated())
        | {FIELD: record_of(plan.options, plan.converts, revision_of(checkpoint.folder))},
        "quantization_config": plan.layout.quantization_config(plan.ignore, plan.beside),
    }


def digests(checkpoint: Checkpoint, plan: Plan, identity: Identity) -> dict[str, str]:
    """SHA-256 of the files that people edit, by name: what is copied, and ``config.json``."""
    config = json_bytes(config_of(checkpoint, plan))
    return identity.companions | {CONFIG: hashlib.sha256(config).hexdigest()}


def written_names(plan: Plan, others: Sequence[str]) -> list[str]:
    """Relative paths of all files that :func:`finish` leaves in the target."""
    extra = plan.layout.extra_files(plan.ignore)
    index = [INDEX] if len(plan.shards) > 1 else []
    return [*plan.file_names, *others, *extra, REPORT, REPORT_DATA, *index, CONFIG]


def shard_stamps(plan: Plan) -> dict[str, str]:
    """The stamps of the shards, by name."""
    return {
        name: shard_stamp_of(header(plan.outputs(shard)))
        for shard, name in enumerate(plan.file_names)
    }


def is_finished(record: Record, plan: Plan, others: Sequence[str], unseen: bool = False) -> bool:
    """Whether the target already holds all that this run would make, ``others`` copied too.

    Args:
        unseen: the source's weights are still on the hub; its commit says what they are.
    """
    target = record.target
    indexed = len(plan.shards) == 1 or (target / INDEX).exists()
    try:
        done = (target / CONFIG).stat().st_mtime_ns
        same = all(
            (target / name).read_bytes() == Path(record.source, name).read_bytes()
            for name in others
        )
    except OSError:
        return False
    # A commit on the hub stays as it is: its files may only have been downloaded once more.
    commit = record.identity is not None and record.identity.is_commit
    later = not commit and any(changed > done for changed in record.files.values())
    if later or not (same and indexed):
        return False
    if unseen:
        by_report = record.of_commit and report_files.of_commit(target) == record.of_commit
    else:
        by_report = report_files.are_of(target, record.fingerprint)
    return bool(
        by_report
        and not record.lasts
        and all((target / name).exists() for name in plan.layout.extra_files([]))
        and all(
            is_complete(target / name, plan.outputs(shard))
            for shard, name in enumerate(plan.file_names)
        )
    )
