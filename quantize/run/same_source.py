"""Whether a source that is still on the hub is the one that a target has something of.

A run sees that for itself, by a few bytes of every tensor; but only when all of it is here. A
branch that has moved on since is seen before hundreds of gigabytes are downloaded.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from quantize.checkpoint.identity import Identity, differences, read_identity
from quantize.checkpoint.json_files import read_json
from quantize.errors import QuantizeError
from quantize.run.leftovers import SOURCE, another_source, check_streamed_alike
from quantize.run.made import made
from quantize.run.run_file import NAME, RunFile
from quantize.run.target import CONFIG, FOLDER


def check_same_source(target: Path, identity: Identity) -> None:
    """Refuse to go on in ``target`` with another commit, or without ``--stream`` if it began so.

    Args:
        identity: the source's, of whose tensors nothing is known yet.

    Raises:
        QuantizeError: if that is so.
    """
    folder = target / FOLDER
    if not (folder / NAME).exists():
        check_made_of(target, identity)
        return
    try:
        found = RunFile.read(folder, target)
    except QuantizeError:
        return  # the run says so
    before = read_identity(folder / SOURCE)
    if before is None or found.damaged:  # damaged files may be repaired, in another commit too
        return
    check_streamed_alike(folder, before, streamed=False)
    if before.revision != identity.revision:
        raise another_source(folder, differences(before, identity, set())[1])


def check_made_of(target: Path, identity: Identity | None) -> None:
    """Raise QuantizeError if the finished checkpoint in ``target``, if there is one, is known to be
    of another commit."""
    now = identity.revision if identity else None
    before = None
    with suppress(QuantizeError):
        found = made(read_json(target / CONFIG), str(target / CONFIG))
        before = found.revision if found else None
    if before and now and before != now:
        raise QuantizeError(
            f"{target} holds a checkpoint that was made of {before}, and SRC is {now}; pass that "
            "commit with --revision, or --overwrite to replace it"
        )


def already_noted(target: Path, identity: Identity) -> Identity:
    """What a run in ``target`` has noted of a source that is still on the hub, if it is of the same
    commit; else ``identity``."""
    before = read_identity(target / FOLDER / SOURCE)
    if before is None or before.revision is None or before.revision != identity.revision:
        return identity
    return before
