"""What a repository on the hub holds already, and what of it goes with a new version.

By its report a repository is known as one of ours; but anybody can write a report, and people edit
files and add some. So what goes must be proven to be as this package wrote it, as in a target
(``quantize.run.replaced``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from quantize.checkpoint.hub import CONFIG
from quantize.checkpoint.identity import file_digest
from quantize.checkpoint.json_files import INDEX, read_json
from quantize.errors import QuantizeError
from quantize.layouts import config_files
from quantize.push.checkpoint import WRITTEN_ANEW
from quantize.report import RunReport, loads
from quantize.run.replaced import may_be_written
from quantize.run.report_files import REPORT_DATA

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_WEIGHTS = (
    *("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.onnx", "*.h5"),
    "*.safetensors.index.json",
)
"""Files that make up another model, if they are beside ours. Of an index that is not ours an engine
would load what it names, and nothing else."""


@dataclass(frozen=True)
class There:
    """What a repository holds, of the checkpoint that is uploaded or of an earlier version of it.

    Attributes:
        commit: at which it holds that; None if the hub does not say.
        files: relative paths of all that is there.
        report: of what this package has uploaded; None if it has uploaded nothing.
        left: files that the earlier version had and the new one has not, as this package wrote
            them; but for weights: engines that find them would read them.
        edited: such files that somebody has changed since, or put there anew.
    """

    commit: str | None
    files: list[str]
    report: RunReport | None
    left: list[str]
    edited: list[str]


def look(api: HfApi, name: str, ours: Sequence[str], base: str | None) -> There:
    """What the repository ``name`` holds.

    Args:
        ours: relative paths of what is uploaded as it is.
        base: the model on the hub, ``ORG/NAME``, that it is made of; None if not known.

    Raises:
        QuantizeError: if that is another model, or its report cannot be read.
    """
    commit = api.model_info(name).sha
    files = api.list_repo_files(name, revision=commit)
    report = _report(api, name, commit) if REPORT_DATA in files else None
    known = {*filter(may_be_written, report.files)} if report else set()
    known -= {*ours, *WRITTEN_ANEW}
    earlier = [f for f in files if f in known and not f.endswith(".safetensors")]
    left = [f for f in earlier if report and _is_as_written(api, name, commit, f, report)]
    weights = [f for f in files if any(fnmatchcase(f, p) for p in _WEIGHTS)]
    if strange := [f for f in weights if f not in ours and f not in left]:
        raise QuantizeError(
            f"{name} on the hub has weights that are not this checkpoint's ({strange[0]}), and an "
            "engine could load both; delete them there, or choose another name"
        )
    there = There(commit, files, report, left, [f for f in earlier if f not in left])
    if report is not None:
        made_of = (report.revision or "").rpartition("@")[0]
        if base and made_of and base != made_of:
            raise QuantizeError(
                f"{name} on the hub holds another model, made of {made_of}; choose another name"
            )
        return there
    # Most models of one file call it alike.
    if found := [f for f in files if f in (CONFIG, *weights)]:
        raise QuantizeError(
            f"{name} on the hub holds another model: beside its {found[0]} there is no "
            f"{REPORT_DATA}; choose another name"
        )
    return there


def _is_as_written(api: HfApi, name: str, commit: str | None, file: str, report: RunReport) -> bool:
    """Whether a file is as the run of ``report`` wrote it. Nobody edits what a layout adds; and an
    index is of that run if it names its files, and no others."""
    if file in config_files():
        return True
    there = Path(api.hf_hub_download(name, file, revision=commit))
    if file != INDEX:
        return file_digest(there) == report.digests.get(file)
    try:
        named = read_json(there).get("weight_map")
    except QuantizeError:
        return False
    return (
        isinstance(named, dict) and bool(named) and all(f in report.files for f in named.values())
    )


def _report(api: HfApi, name: str, commit: str | None) -> RunReport:
    try:
        return loads(Path(api.hf_hub_download(name, REPORT_DATA, revision=commit)).read_bytes())
    except QuantizeError as error:
        raise QuantizeError(
            f"{name}/{REPORT_DATA} on the hub cannot be read, so that nobody knows what is there "
            f"({error}); choose another name, or delete what is there"
        ) from error
