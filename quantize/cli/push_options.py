"""``--push-to``: uploading the checkpoint, now or once it is finished."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quantize.cli.before_it_starts import say
from quantize.cli.errors import UsageError
from quantize.cli.output import out
from quantize.cli.progress import uploading
from quantize.cli.signals import ending_at_once
from quantize.errors import QuantizeError

if TYPE_CHECKING:
    from quantize.checkpoint.reader import Checkpoint
    from quantize.push import Finished
    from quantize.run.plan import Plan

PushOption = Annotated[
    str | None,
    typer.Option(
        "--push-to",
        metavar="ORG/NAME",
        help="Upload DST to the hub when it is finished, with a model card; the same command again "
        "goes on with an upload, e.g. --push-to me/model-NVFP4.",
    ),
]
EvaluationOption = Annotated[
    Path | None,
    typer.Option(
        "--evaluation",
        metavar="FILE",
        help="What `evaluate --json` printed of DST, for its model card, e.g. --push-to "
        "me/model-NVFP4 --evaluation result.json.",
    ),
]


def check_push(name: str | None, source: str, evaluation: Path | None, starts_anew: bool) -> None:
    """Refuse a name that is none, and SRC's.

    Args:
        starts_anew: a checkpoint is made, whatever is in DST.

    Raises:
        UsageError: if it is.
    """
    if name is None:
        if evaluation is not None:
            raise UsageError("--evaluation needs --push-to")
        return
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise UsageError(f"--push-to {name}: a name on the hub is ORG/NAME")
    if evaluation is not None and starts_anew:
        raise UsageError(
            "--evaluation is of a finished DST: quantize, evaluate, then repeat the command with "
            "--push-to and --evaluation, without --overwrite and --resume"
        )
    if name == source:
        raise UsageError(f"--push-to {name} is SRC, which it would replace; choose another name")


def reserve_for(name: str, checkpoint: Checkpoint, steps: Plan) -> None:
    """Make the repository, before hours of work; raises what ``push.reserve`` does."""
    from quantize.checkpoint.companions import companions
    from quantize.checkpoint.hub import revision_of
    from quantize.push import reserve
    from quantize.run.finish import written_names

    base = (revision_of(checkpoint.folder) or "").rpartition("@")[0] or None
    reserve(name, written_names(steps, companions(checkpoint.folder)), base, say)


def push_finished(
    name: str | None, target: Path, command: str, evaluation: Path | None, anew: bool = False
) -> bool:
    """Upload the checkpoint in ``target``, if there is one that this command made.

    Args:
        command: the command line.
        anew: there must be one, since this run has just made it.

    Returns:
        whether there is one.

    Raises:
        QuantizeError: if another command made it, or the upload fails.
    """
    from quantize.push import finished, push

    assert name is not None
    made = finished(target)
    if made is None:
        if anew:
            raise QuantizeError(f"{target}: the checkpoint is gone again; quantize again")
        check_push(name, "", evaluation, starts_anew=True)
        return False
    if not anew and not made.is_made_by(command):
        raise QuantizeError(
            f"{target} was made by another command: {made.report.command}; repeat that one with "
            "--push-to to upload it, or pass --overwrite to replace it"
        )
    try:
        with ending_at_once(f"{target} is complete; run the same command to go on with the upload"):
            page = push(made, name, _read(evaluation, made), say, uploading)
    except QuantizeError as error:
        raise QuantizeError(
            f"{target} is complete, but {error}; the same command, without --overwrite and "
            "--resume, goes on with the upload"
        ) from error
    out.print(f"Uploaded: {page}", soft_wrap=True, highlight=False, markup=False)
    return True


def _read(evaluation: Path | None, made: Finished) -> dict[str, Any] | None:
    from quantize.checkpoint.hub import revision_of

    if evaluation is None:
        return None
    target = made.folder
    try:
        found = json.loads(evaluation.read_text(encoding="utf-8"))
        older = evaluation.stat().st_mtime < (target / "config.json").stat().st_mtime
    except (OSError, ValueError) as error:
        raise QuantizeError(f"--evaluation {evaluation}: {error}") from error
    if not isinstance(found, dict):
        raise QuantizeError(f"--evaluation {evaluation}: this is not what evaluate --json prints")
    if older:
        raise QuantizeError(
            f"--evaluation {evaluation} is older than DST's config.json; evaluate DST again"
        )
    before = revision_of(Path(str(found.get("source"))))
    of = str(made.made.get("revision") or "")
    if before and of and before.rpartition("@")[2] != of.rpartition("@")[2]:
        raise QuantizeError(
            f"--evaluation {evaluation} compares DST with {before}, and it was made of {of}; "
            "evaluate again, with that commit as --revision, or without"
        )
    return found
