"""Finishing a target whose shards are there: other files, index, and ``config.json`` as the last.

Until ``config.json`` is there, no engine takes the folder for a checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence

from quantize.checkpoint.headers import INDEX
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.gates import KEY, to_contract
from quantize.run.files import replacing, write_json
from quantize.run.plan import Plan
from quantize.run.record import Record
from quantize.run.report_files import REPORT, REPORT_DATA
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
    for name in others:
        # Resolved: a link was checked to lead to the checkpoint's own files.
        file, place = (checkpoint.folder / name).resolve(), record.place(name)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with file.open("rb") as copied, replacing(place, partial) as copy:
                shutil.copyfileobj(copied, copy)
        except OSError as error:
            raise QuantizeError(
                f"{checkpoint.folder / name} cannot be copied to {target}: "
                f"{error.strerror or error}"
            ) from error
    for name, value in plan.layout.extra_files(plan.ignore).items():
        write_json(record.place(name), value, partial)
    for name, content in reports.items():
        with replacing(record.place(name), partial) as page:
            page.write(content)
    if INDEX in record.names:
        weight_map = {
            out.name: name for i, name in enumerate(plan.file_names) for out in plan.outputs(i)
        }
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        write_json(record.place(INDEX), index, partial)
    config = checkpoint.config | {
        KEY: to_contract(plan.gates.concatenated()),
        "quantization_config": plan.layout.quantization_config(plan.ignore),
    }
    record.publish(lambda place: write_json(place, config, partial))


def written_names(plan: Plan, others: Sequence[str]) -> list[str]:
    """Relative paths of all files that :func:`finish` leaves in the target."""
    extra = plan.layout.extra_files(plan.ignore)
    index = [INDEX] if len(plan.shards) > 1 else []
    return [*plan.file_names, *others, *extra, REPORT, REPORT_DATA, *index, CONFIG]
