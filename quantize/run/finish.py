"""Finishing a target whose shards are there: other files, index, and ``config.json`` as the last.

Until ``config.json`` is there, no engine takes the folder for a checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from quantize.checkpoint.descriptions import STALE_FILES, without_descriptions
from quantize.checkpoint.headers import INDEX
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.experts.gates import KEY, to_contract
from quantize.layouts import config_files
from quantize.run.files import replacing, sync, write_json
from quantize.run.made import FIELD, record_of
from quantize.run.plan import Plan
from quantize.run.record import Record
from quantize.run.report_files import REPORT, REPORT_DATA

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
_REWRITTEN = {"config.json", INDEX, REPORT, REPORT_DATA, *STALE_FILES}


def finish(
    checkpoint: Checkpoint,
    plan: Plan,
    record: Record,
    others: Sequence[Path],
    reports: Mapping[str, bytes],
) -> None:
    """Make the target of ``record`` a checkpoint, and end the record.

    Args:
        others: files that are copied, see :func:`other_files`.
        reports: contents of the report's files by name.

    Raises:
        QuantizeError: if a file cannot be copied, or another run has taken the target over.
    """
    record.check_ours()
    target, partial = record.target, record.partial("other")
    for file in others:
        try:
            with file.open("rb") as copied, replacing(target / file.name, partial) as copy:
                shutil.copyfileobj(copied, copy)
        except OSError as error:
            raise QuantizeError(
                f"{file} cannot be copied to {target}: {error.strerror or error}"
            ) from error
    for name, value in plan.layout.extra_files(plan.ignore).items():
        write_json(target / name, value, partial)
    for name, content in reports.items():
        with replacing(target / name, partial) as page:
            page.write(content)
    if len(plan.shards) > 1:
        weight_map = {
            out.name: name for i, name in enumerate(plan.file_names) for out in plan.outputs(i)
        }
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        write_json(target / INDEX, index, partial)
    config = without_descriptions(checkpoint.config) | {
        KEY: to_contract(plan.gates.concatenated()) | {FIELD: record_of(plan.options)},
        "quantization_config": plan.layout.quantization_config(plan.ignore),
    }
    sync(target)  # all names but the last
    write_json(target / "config.json", config, partial)
    sync(target)
    record.end()


def other_files(folder: Path) -> Iterator[Path]:
    """What is copied beside the weights: tokenizer, generation settings, licence and so on."""
    rewritten = _REWRITTEN | config_files()
    for file in sorted(folder.iterdir()):
        if file.suffix in _WEIGHTS or file.name.endswith(".index.json"):
            continue
        if file.is_symlink() and not file.exists():
            raise QuantizeError(f"{file}: the link leads nowhere; download the checkpoint again")
        if file.is_file() and file.name not in rewritten:
            yield file
