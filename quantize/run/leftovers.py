"""What an interrupted run has left in a target, and what of it goes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from quantize.checkpoint.identity import Identity, differences, read_identity
from quantize.errors import QuantizeError
from quantize.run.replaced import Replaced, free_name, survey
from quantize.run.run_file import NAME, RunFile
from quantize.run.shard_records import ShardRecords

SOURCE = "source.json"
"""The source's identity, in the record's folder."""


def replaced_by_new(target: Path, folder: Path, names: Sequence[str]) -> Replaced:
    """What a run that begins replaces: of a checkpoint, and of an interrupted run.

    Args:
        folder: the record's.
        names: of the files that the run writes.

    Raises:
        QuantizeError: see ``survey``.
    """
    if not target.exists():
        return Replaced()
    named, left = ShardRecords(folder).names(), set[str]()
    with suppress(QuantizeError):
        found = RunFile.read(folder, target)
        left |= {*found.replaced.delete}
        if found.cleared:
            left |= found.written(target)
            named += found.names
    return survey(target, names, left, named)


def replaced_by_same(target: Path, names: Sequence[str], found: RunFile) -> Replaced:
    """What a run that goes on still replaces: what is proven to be that which it began to replace,
    and whatever has come into the way of its files since.

    Raises:
        QuantizeError: see ``survey``.
    """
    if not found.cleared:
        return replace(survey(target, names, found.replaced.delete), folder=found.replaced.folder)
    ours = found.written(target)
    strange = (name for name in names if name not in ours and (target / name).is_file())
    return Replaced((), tuple(strange), free_name(target))


def repaired(folder: Path, found: RunFile, settings: str, identity: Identity | None) -> set[str]:
    """The tensors in which the source differs from an interrupted run's, all in damaged files.

    Raises:
        QuantizeError: if it differs in anything else.
    """
    before = read_identity(folder / SOURCE)
    if before and identity:
        check_streamed_alike(folder, before, not any(identity.tensors.values()))
    if found.settings != settings or before is None or identity is None:
        raise QuantizeError(
            f"{folder / NAME}: the interrupted run had another source, options or version of this "
            "package; use the same ones, or start again with --overwrite"
        )
    changed, strange = differences(before, identity, found.damaged)
    if strange or not changed:
        raise another_source(folder, strange)
    return changed


def another_source(folder: Path, strange: Sequence[str]) -> QuantizeError:
    """The error that an interrupted run had another source, which differs in ``strange``."""
    return QuantizeError(
        f"{folder / NAME}: the interrupted run had another source: {', '.join(strange[:3])} "
        "changed since; use the same one, or start again with --overwrite"
    )


def check_streamed_alike(folder: Path, before: Identity, streamed: bool) -> None:
    """Raise QuantizeError if the interrupted run that noted ``before`` had ``--stream``, and this
    one has not, or the other way round."""
    if any(before.tensors.values()) == streamed:
        how = "without --stream" if streamed else "with --stream"
        raise QuantizeError(
            f"{folder / NAME}: the interrupted run was started {how}; go on so, or start again "
            "with --overwrite"
        )
