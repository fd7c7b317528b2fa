"""Weights that come from the hub a few files at a time, and go when nobody needs them any more.

Work is done in steps, and each says which files it reads. Files are downloaded in the order in
which steps need them: all that the first unfinished step needs, and ``AHEAD`` more. A file is
removed when the last step that reads it is finished. So the disk holds a known number of bytes
(:func:`peak`), whatever the size of the model. A step begins when all but the one before it are
finished.

Each file is compared with the hash that the hub lists before anybody reads it: it cannot be looked
at again later. What tells the checkpoint from another (``identity``) is noted of it at the same
time, in a small file that stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Condition, Thread
from typing import NoReturn

from quantize.checkpoint.client_words import client_words
from quantize.checkpoint.disk import cannot_be_written, disk_error
from quantize.checkpoint.hub import HubModel, advice, asking, behind
from quantize.checkpoint.hub_weights import HubWeights, is_passing, read_range
from quantize.checkpoint.json_files import read_json
from quantize.duration import duration
from quantize.errors import QuantizeError

AHEAD = 4
"""Files that may be on the disk, or on their way, before a step needs them."""

_AT_ONCE = 2
"""Files that are downloaded at the same time; the hub's client reads each in several parts."""

_TRIES = 12
_LONGEST_WAIT = 60
"""Seconds between two tries, at most."""
_PATIENCE = 300.0
"""Seconds in which nothing comes of a file, after which the run ends: a hub that is away for a few
minutes ends none."""

Steps = Sequence[Collection[str]]
"""For each step, the names of the files that it reads."""

Noted = dict[str, str]
"""Digests of a file's tensors, by their names."""


def peak(steps: Steps, sizes: Mapping[str, int], made: Sequence[int]) -> int:
    """The most bytes that are on the disk at any time, of files and of what steps make of them.

    Args:
        sizes: of the files, in bytes, by name.
        made: bytes that each step makes, which stay.
    """
    order = in_order(steps)
    first, last = uses(steps)
    most = 0
    for step in range(len(steps)):
        needed = [name for name in order if first[name] <= step <= last[name]]
        ahead = [name for name in order if first[name] > step][:AHEAD]
        there = sum(sizes[name] for name in (*needed, *ahead))
        most = max(most, there + sum(made[: step + 2]))  # the next one may have begun
    return most


def in_order(steps: Steps) -> list[str]:
    """All files, in the order in which steps need them."""
    return list(dict.fromkeys(name for step in steps for name in sorted(step)))


def uses(steps: Steps) -> tuple[dict[str, int], dict[str, int]]:
    """Of each file, the first and the last step that reads it."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for number, step in enumerate(steps):
        for name in step:
            first.setdefault(name, number)
            last[name] = number
    return first, last


class Streamed(HubWeights):
    """Some files of a model on the hub; until :meth:`begin` only their headers can be read."""

    def __init__(self, model: HubModel, names: Sequence[str]) -> None:
        super().__init__(model, names)
        self._changed = Condition()
        self._folder: Path | None = None
        self._set((), lambda _: {}, lambda _: None, lambda _: None)

    def _set(
        self,
        steps: Steps,
        note: Callable[[Path], Noted],
        close: Callable[[str], None],
        say: Callable[[str], None],
    ) -> None:
        self._steps, self._note, self._close, self._say = steps, note, close, say
        self._first, _ = uses(steps)
        self._queue = in_order(steps)
        self._here: set[str] = set()
        self._gone: set[str] = set()
        self._coming: set[str] = set()
        self._finished: set[int] = set()
        self._error: BaseException | None = None
        self._stopped = False
        self._threads: list[Thread] = []

    def begin(
        self,
        folder: Path,
        steps: Steps,
        note: Callable[[Path], Noted],
        close: Callable[[str], None],
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start downloading.

        Args:
            folder: where to. What an earlier run has left there is gone on with.
            note: what is to be remembered of a whole file, see :attr:`noted`.
            close: called with a file's name before it is removed.
            say: is told, in any thread, what a download waits for.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in (folder / ".cache").rglob("*.incomplete"):
                left.unlink()  # of a run that was killed; the client would never go on with it
        except OSError as error:
            raise cannot_be_written(folder, "DST", error) from error
        self._folder = folder
        self._set(steps, note, close, say)
        for name in self._names:
            if name in self._first and self._is_whole(name):
                self._here.add(name)
            elif name not in self._first:
                (folder / name).unlink(missing_ok=True)
        self._threads = [
            Thread(target=self._work, name=f"download {n}", daemon=True) for n in range(_AT_ONCE)
        ]
        for thread in self._threads:
            thread.start()

    def finished(self, step: int) -> None:
        """Note that a step is: what only it needed goes."""
        with self._changed:
            self._finished.add(step)
            left = {n for k, s in enumerate(self._steps) if k not in self._finished for n in s}
            gone = [name for name in self._here if name not in left]
            self._here.difference_update(gone)
            self._gone.update(gone)
            self._changed.notify_all()
        for name in gone:
            self._close(name)
            self._path(name).unlink(missing_ok=True)

    def await_step(self, step: int) -> None:
        """Return when a step may begin; raises what :meth:`open` does."""
        with self._changed:
            while not self._finished.issuperset(range(step - 1)):
                self._check_alive()
                self._changed.wait()

    def stop(self) -> None:
        """Download nothing more, and let nobody wait."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def wait(self) -> None:
        """After :meth:`stop`: until nothing is written any more, for a moment at most. Threads that
        wait for the hub end with the process."""
        for thread in self._threads:
            thread.join(1)

    @property
    def noted(self) -> dict[str, Noted]:
        """What was noted of each file.

        Raises:
            QuantizeError: if a file was never here.
        """
        return {name: self._read_note(name) for name in self._names}

    def has_note(self, folder: Path, name: str) -> bool:
        """Whether a file was whole in ``folder`` once."""
        return (folder / f"{name}.json").exists()

    def await_file(self, name: str) -> None:
        """Return when a file is here; raises what :meth:`open` does."""
        os.close(self.open(Path(name)))

    def open(self, file: Path) -> int:
        name = file.name
        with self._changed:
            while name not in self._here:
                self._check_alive()
                if name not in self._first:
                    return super().open(file)  # which says that it is not here
                self._changed.wait()
            return os.open(self._path(name), os.O_RDONLY)

    def is_here(self, file: Path) -> bool:
        return file.name in self._here

    def apart(self, file: Path, begin: int, end: int) -> bytes | None:
        # What no step needs was here in an earlier run.
        if self._folder is None or file.name in self._first.keys() - self._gone:
            return None
        with asking(self.model.name):
            return read_range(self.model, file.name, begin, end)

    def _check_alive(self) -> None:
        if self._error is not None:
            raise QuantizeError(str(self._error)) from self._error
        if self._stopped:
            raise StoppedError(
                f"{self.model.name}: the run has stopped, and downloads nothing more"
            )

    # -- the threads that download -----------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (name := self._next()) is not None:
                self._bring(name)
                with self._changed:
                    self._coming.discard(name)
                    self._here.add(name)
                    self._changed.notify_all()
        except StoppedError:
            pass
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
                self._changed.notify_all()

    def _next(self) -> str | None:
        """The next file to download, once there is room for it; None: no more."""
        with self._changed:
            while True:
                while self._queue and self._queue[0] in self._here:
                    self._queue.pop(0)
                if self._stopped or self._error is not None or not self._queue:
                    return None
                steps = range(len(self._steps))
                now = next((step for step in steps if step not in self._finished), len(steps))
                ahead = [n for n in (*self._here, *self._coming) if self._first[n] > now]
                if self._first[self._queue[0]] <= now or len(ahead) < AHEAD:
                    name = self._queue.pop(0)
                    self._coming.add(name)
                    return name
                self._changed.wait()

    def _bring(self, name: str) -> None:
        """Download a file, and see that it is what the hub lists."""
        assert self._folder is not None
        came = [time.monotonic()]  # when something last did
        with asking(self.model.name):
            for attempt in range(_TRIES):
                try:
                    self._download(name, came)
                    self._check(name)
                except Exception as error:
                    if isinstance(error, QuantizeError):
                        raise
                    if (full := disk_error(behind(error))) is not None:
                        raise cannot_be_written(self._folder, "DST", full) from full
                    if not is_passing(behind(error)):
                        self._refuse(name, error)
                    pause = min(2**attempt, _LONGEST_WAIT)
                    left = came[0] + _PATIENCE - time.monotonic()
                    why = f"{self.model.name}/{name}: {client_words(behind(error), whole=False)}"
                    if attempt == _TRIES - 1 or pause > left:
                        raise QuantizeError(
                            f"{why}; it was tried {attempt + 1} times; go on later, by the same "
                            "command with --resume"
                        ) from error
                    self._say(
                        f"{why}; trying again in {duration(pause)}, and for {duration(left)} at "
                        "most if nothing comes"
                    )
                    self._pause(pause)
                else:
                    return

    def _refuse(self, name: str, error: Exception) -> NoReturn:
        """Raise an error that stays, when a part of the model has come already."""
        from huggingface_hub.errors import RevisionNotFoundError

        said = f"{self.model.name}/{name}: {client_words(behind(error))}"
        if isinstance(behind(error), RevisionNotFoundError):
            raise QuantizeError(
                f"{said}; the hub has commit {self.model.commit} no longer: begin again with what "
                "it has now, by --overwrite"
            ) from error
        to_do = advice(error) or "; find out why"
        raise QuantizeError(
            f"{said}{to_do}; then go on, by the same command with --resume"
        ) from error

    def _download(self, name: str, came: list[float]) -> None:
        from huggingface_hub import hf_hub_download

        hf_hub_download(
            self.model.name,
            name,
            revision=self.model.commit,
            local_dir=self._folder,
            tqdm_class=self._bar(came),
        )

    def _check(self, name: str) -> None:
        path, known = self._path(name), self.model.files[name]
        size = path.stat().st_size
        digest = _hash_of(path, known.has_sha256) if size == known.size else f"{size} bytes"
        right = digest == known.digest
        if size == known.size and not known.has_sha256 and not right:
            right = _pointer_of(path) == known.digest
        if not right:
            path.unlink()
            raise ConnectionError(
                f"what came is not what the hub lists ({digest} instead of {known.size} bytes, "
                f"{known.digest})"
            )
        with path.open("rb") as file:
            same = file.read(len(self._beginnings[name])) == self._beginnings[name]
        if not same:
            raise QuantizeError(f"{self.model.name}/{name}: another header came than before")
        note = self._note_file(name)
        partial = note.with_name(f".{note.name}.partial")
        partial.write_text(json.dumps(self._note(path)), encoding="utf-8")
        partial.replace(note)

    def _pause(self, seconds: float) -> None:
        with self._changed:
            end = time.monotonic() + seconds
            while not self._stopped and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            if self._stopped:
                raise StoppedError("stopped")

    def _bar(self, came: list[float]) -> type:
        """What the client takes for a progress bar (its own ``silent_tqdm`` has no more either):
        it shows nothing, ends a download that nobody waits for, and notes when something came."""
        weights = self

        class Bar:
            def __init__(self, *_: object, **__: object) -> None:
                pass

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *_: object) -> None:
                pass

            def update(self, n: float | None = 1) -> None:
                if weights._stopped:
                    raise StoppedError("stopped")
                if n:
                    came[0] = time.monotonic()

        return Bar

    # -- what is noted of files --------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / name

    def _note_file(self, name: str) -> Path:
        return self._path(f"{name}.json")

    def _is_whole(self, name: str) -> bool:
        """Whether a file is here already, and was found to be right."""
        with suppress(OSError, QuantizeError):
            self._read_note(name)
            return self._path(name).stat().st_size == self.model.files[name].size
        return False

    def _read_note(self, name: str) -> Noted:
        return {key: str(value) for key, value in read_json(self._note_file(name)).items()}


class StoppedError(QuantizeError):
    """Nobody waits for a file any more, for something else has gone wrong."""


def _pointer_of(path: Path) -> str:
    """Git's hash of what stands for a file of LFS in its repository. A mirror's list of files
    may not say that it is (https://github.com/git-lfs/git-lfs, its specification)."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{_hash_of(path, True)}\n"
    pointer = f"{text}size {path.stat().st_size}\n".encode()
    return hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()


def _hash_of(path: Path, sha256: bool) -> str:
    """SHA-256 of a file, or git's hash of it."""
    git = hashlib.sha1(b"blob %d\0" % path.stat().st_size)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256" if sha256 else lambda: git).hexdigest()
