"""Uploading the files of a finished checkpoint.

They go in several commits. The report comes with the first: by it a repository is known as one of
ours, whatever becomes of the upload. ``config.json`` and card come with the last: until then
nothing takes the repository for a model, also where another version of the checkpoint is replaced:
what is left of that goes before, in a commit of its own.
The hub keeps what it has, so the same again goes on: of a file that is there already nothing is
sent.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal

from quantize.checkpoint.client_words import client_words
from quantize.checkpoint.coming import Shown, not_shown
from quantize.checkpoint.hub import CONFIG, advice
from quantize.checkpoint.hub_weights import is_passing
from quantize.duration import duration
from quantize.errors import QuantizeError
from quantize.push.card import card
from quantize.push.checkpoint import CARD, Finished, uploaded
from quantize.push.report import published
from quantize.push.there import There, look
from quantize.run.version import PACKAGE, package_version

if TYPE_CHECKING:
    from huggingface_hub import HfApi

Say = Callable[[str], None]

_BATCH_FILES, _BATCH_BYTES = 10, 20 * 10**9
"""Most of one commit: what is lost at a broken connection is hashed again, though not sent."""

_TRIES = 6
_LONGEST_WAIT = 3600
"""Seconds that the hub may ask to wait before the next try: its limits are by the hour at most."""

_RESET = re.compile(r";\s*t=(\d+)")
"""In a header ``RateLimit: "api";r=0;t=52``: seconds until requests are taken again
(https://huggingface.co/docs/hub/rate-limits)."""


def reserve(
    name: str, written: Sequence[str], base: str | None, say: Say = lambda _: None
) -> There:
    """Make the repository ``name`` on the hub, private, unless it is there; before hours of work.

    Args:
        written: relative paths of what the run will write.
        base: the model on the hub, ``ORG/NAME``, that it is made of; None if not known.

    Returns:
        what is there.

    Raises:
        QuantizeError: if this user may not, or another model is there.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _pushing(name):
        # One that has another name now is there: to make it would end the hub's forwarding to it.
        new = not api.repo_exists(name)
        if new:
            api.create_repo(name, private=True, exist_ok=True)
        _check_may_write(api, name)
        if new:
            say(f"{name} is new on the hub, and private: make it public on its page there")
        there = look(api, name, ours := uploaded(list(written)), base)
    if there.edited:
        say(
            f"{name} on the hub has {', '.join(there.edited)}, which this package did not write as "
            "it is now: it stays, and engines may read it; delete it there if it is of no use"
        )
    if there.report is None and (theirs := [f for f in there.files if f in (CARD, *ours)]):
        say(f"{name} on the hub has {', '.join(theirs)}: replaced, and kept in its history")
    return there


def _check_may_write(api: HfApi, name: str) -> None:
    """Raise the client's error if the hub says that this user may not write there."""
    try:
        api.auth_check(name, write=True)
    except Exception as error:
        if _answer(error)[0] in (401, 403):
            raise  # else this hub cannot be asked, as mirrors may not, and the upload will show it


def push(
    made: Finished,
    name: str,
    evaluation: dict[str, Any] | None = None,
    say: Say = lambda _: None,
    shown: Shown = not_shown,
) -> str:
    """Upload ``made`` as ``name``, or what is not there yet; returns the address of its page.

    Args:
        evaluation: what ``evaluate --json`` printed, for the card.
        shown: shows how much is there.

    Raises:
        QuantizeError: if that fails; nothing here was changed.
    """
    from huggingface_hub import HfApi

    text = card(made, name, evaluation)
    base = made.base[0] if made.base else None
    there = reserve(name, made.report.files, base, say)
    api = HfApi()
    large = [file for file in made.files if file != CONFIG]
    every = [*_batches(made.folder, large), [CONFIG]]
    with _pushing(name):
        _remove(api, name, made, base, there, say)
    sizes = [sum((made.folder / file).stat().st_size for file in files) for files in every]
    with shown(sum(sizes)) as came:
        for number, (files, size) in enumerate(zip(every, sizes, strict=True), 1):
            say(f"uploading to {name}: part {number} of {len(every)}, {decimal(size)}")
            contents: dict[str, str | bytes] = {file: str(made.folder / file) for file in files}
            if number == 1:
                contents |= published(made)
            if files == [CONFIG]:
                contents |= {CARD: text.encode()}
            message = f"Part {number} of {len(every)}, by {PACKAGE} {package_version()}"
            with _pushing(name):
                _commit(api, name, contents, message, say)
            came(size)
    return f"{api.endpoint}/{name}"


def _commit(
    api: HfApi, name: str, contents: Mapping[str, str | bytes], message: str, say: Say
) -> None:
    """One commit of files, by their paths there: each a path here, or what it holds."""
    from huggingface_hub import CommitOperationAdd

    def commit(_: int) -> None:
        files = [CommitOperationAdd(path, content) for path, content in contents.items()]
        api.create_commit(name, files, commit_message=message)

    _tried(commit, name, say)


def _remove(
    api: HfApi, name: str, made: Finished, base: str | None, there: There, say: Say
) -> None:
    """Remove what another version of the checkpoint left and this one has not, and its config. The
    hub is told at which commit that was looked at, and refuses if another came since, in which
    somebody may have edited just those files: it is looked at anew."""
    from huggingface_hub import CommitOperationDelete

    def remove(attempt: int) -> None:
        # Anew also because a commit that seemed to fail may have been made.
        now = look(api, name, uploaded(made.report.files), base) if attempt else there
        other = now.report is not None and now.report.fingerprint != made.report.fingerprint
        gone = [*now.left, *[file for file in now.files if file == CONFIG and other]]
        if gone:
            message = f"Files of the version before, by {PACKAGE} {package_version()}"
            operations = [CommitOperationDelete(file) for file in gone]
            api.create_commit(name, operations, commit_message=message, parent_commit=now.commit)

    _tried(remove, name, say)


def _tried(commit: Callable[[int], None], name: str, say: Say) -> None:
    """Run ``commit`` with the number of the attempt: again, when the hub says or soon, if that may
    help: the connection, the server, or another commit that came at the same time."""
    for attempt in range(_TRIES):
        try:
            commit(attempt)
            return
        except Exception as error:
            status, asked = _answer(error)
            pause = 2.0**attempt if asked is None else asked
            passing = is_passing(error) or status in (409, 412)
            if attempt == _TRIES - 1 or not passing or pause > _LONGEST_WAIT:
                raise
            if pause > 30:
                why = client_words(error, whole=False)
                say(f"uploading to {name}: {why}; trying again in {duration(pause)}")
            time.sleep(pause)


def _answer(error: BaseException) -> tuple[int, float | None]:
    """What the hub answered: its status, 0 if it was not the hub's; and after how many seconds it
    wants to be asked again, if it says so."""
    from huggingface_hub.errors import HfHubHTTPError

    response = error.response if isinstance(error, HfHubHTTPError) else None
    if response is None:
        return 0, None
    after = response.headers.get("Retry-After", "").strip()
    reset = _RESET.search(response.headers.get("RateLimit", ""))
    if not after.isdecimal():
        after = reset[1] if reset and response.status_code == 429 else ""
    return response.status_code, float(after) if after else None


def _batches(folder: Path, files: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for file in files:
        nbytes = (folder / file).stat().st_size
        if batch and (len(batch) == _BATCH_FILES or size + nbytes > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += nbytes
    if batch:
        yield batch


@contextmanager
def _pushing(name: str) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except QuantizeError:
        raise
    except Exception as error:
        # What the client says of an answer of the hub's is a ValueError now and then.
        answered = isinstance(error.__cause__, HfHubHTTPError)
        to_do = "" if answered else advice(error)
        if _answer(error)[0] in (401, 403):
            to_do = "; log in with `hf auth login`, with a token that may write there"
            if _answer(error)[0] == 403:  # the client's own words speak of the token alone
                to_do += ", unless the hub has another reason, such as a full quota"
        raise QuantizeError(f"uploading to {name} failed: {client_words(error)}{to_do}") from error
