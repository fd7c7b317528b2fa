"""What a run leaves in its target while it is not finished, so that another can go on with it.

``DST/.nvfp4_moe/`` holds ``run.json`` (``run_file``), files that are being written, and for each
finished shard one with what its weights lost (``shard_records``), for the report. A run lasts as
long as ``run.json`` is there; the folder goes when it is complete.

Where there is an old checkpoint, and room beside it, new files come into ``DST/.nvfp4_moe/new/``
and the old ones stay until all of them are there. Else new files come into ``DST`` itself.

At any moment the run may be killed, or the machine lose its power. So every file gets its name in
one step, ``run.json`` comes before anything is changed and goes after everything is done, and what
a record says is believed only if it is whole. And anyone may have written it: in the target itself
only those of the files that it names are removed that have the stamps it gives (``stamps``).
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from quantize.checkpoint.disk import out_of_space
from quantize.checkpoint.identity import Identity
from quantize.checkpoint.json_files import INDEX, read_json
from quantize.errors import DamagedWeightsError, QuantizeError
from quantize.run.bits import MEASURED
from quantize.run.files import sync, write_json
from quantize.run.leftovers import SOURCE, repaired, replaced_by_new, replaced_by_same
from quantize.run.lock import LOCK
from quantize.run.replaced import Replaced, check_links_among
from quantize.run.run_file import NAME, RunFile
from quantize.run.same_source import check_made_of
from quantize.run.sessions import NAME as SESSIONS
from quantize.run.shard_records import PATTERN, ShardRecords
from quantize.run.target import CONFIG, check_room_for_names, check_target, is_free
from quantize.run.target import FOLDER as FOLDER
from quantize.run.weight_error import WeightError
from quantize.run.work_dir import WorkDir


class Record:
    """The record of a run in the folder ``target``.

    Args:
        fingerprint: ``Plan.fingerprint``.
        command: how the run was started, for the report; a resumed run keeps the first one's.
        source: what it reads, likewise.
        files: the source's files with their times of modification, in nanoseconds.
        names: relative paths of all files that the run writes; the index only if there are several
            shards, see :attr:`names`.
        shards: stamps of the shards, by name.
        settings, identity: ``Plan.settings`` and ``identity_of`` the source.
        of_commit: ``Plan.fingerprint_of_commit``.
        work: the folder of ``--work-dir``.

    Attributes:
        names: relative paths of all files that the finished target has of this run.
        cleared: whether the target holds nothing any more of the checkpoint that is replaced.
        replaced: what that is.
        stamps: of the files beside the shards, once they are announced (:meth:`announce`).
        changed: paths of the source's files that have changed since the run began.
        repaired: names of the source's tensors that have, in files that were damaged.
    """

    def __init__(
        self,
        target: Path,
        fingerprint: str,
        command: str = "",
        source: str = "",
        files: Mapping[str, int] | None = None,
        *,
        names: Sequence[str] = (),
        shards: Mapping[str, str] | None = None,
        settings: str = "",
        identity: Identity | None = None,
        of_commit: str = "",
        work: Path | None = None,
    ) -> None:
        self.target = target
        self.folder = target / FOLDER
        self.fingerprint = fingerprint
        self.command = command
        self.source = source
        self.files = dict(files or {})
        self.names = list(names)
        self.shards = dict(shards or {})
        self.settings = settings
        self.identity = identity
        self.of_commit = of_commit
        self.work = WorkDir(work, target) if work else None
        self.changed: set[str] = set()
        self.repaired: set[str] = set()
        self.damaged: set[str] = set()
        self.cleared = True
        self.replaced = Replaced()
        self.stamps: dict[str, str] = {}
        self._adopts: bool | None = None
        self.shard_records = ShardRecords(self.folder)
        self._run = self.folder / NAME
        self._new = self.folder / "new"

    @property
    def calibration(self) -> Path:
        """Where calibration keeps what it has made."""
        return self.work.folder if self.work else self.folder / "calibration"

    @property
    def source_files(self) -> Path:
        """Where files of a source on the hub are, while they are needed (``stream``)."""
        return self.folder / "source"

    @property
    def goes_on(self) -> bool:
        """Whether the run goes on with another one; known once it is prepared."""
        return bool(self._adopts)

    def place(self, name: str) -> Path:
        """Where the file ``name`` of the output belongs now."""
        return (self.target if self.cleared else self._new) / name

    @property
    def lasts(self) -> bool:
        """Whether a run, this one or another, is begun in the target and not over."""
        return self._run.exists()

    def prepare(self, overwrite: bool, resume: bool) -> None:
        """See what is in the target, and whether this run may begin. Nothing is changed.

        Raises:
            QuantizeError: if the target holds anything but an interrupted run of the same plan, or
                a checkpoint to replace, as the flags say.
        """
        check_target(self.target, overwrite, resume)
        if resume and self._run.exists():
            self._adopt()
        elif resume and not is_free(self.target):
            check_made_of(self.target, self.identity)
            raise QuantizeError(
                f"{self.target} holds a checkpoint, but not a whole one of this source and these "
                "options, nor an interrupted run; pass --overwrite to replace it"
            )
        else:
            self._survey()
        if self.work:
            self.work.check()
        strangers = {file.name for file in self.target.glob("*.safetensors")}
        if (strangers - {*self.names, *self.replaced.delete}) and INDEX not in self.names:
            self.names.append(INDEX)  # or an engine would read them as part of the model
        check_room_for_names(self.target, self.names)

    def begin(self, overwrite: bool, resume: bool) -> None:
        """Make the target this run's: the first change there.

        The checkpoint that is replaced stays for now, if there is one; see :meth:`clear`.

        Raises:
            QuantizeError: see :meth:`prepare`.
        """
        if self._adopts is None:
            self.prepare(overwrite, resume)
        if self._adopts:
            self._tidy()
        else:
            self._start()

    def clear(self) -> None:
        """Remove the checkpoint that is replaced; new files come into the target from now on."""
        self.replaced.clear(self.target)
        sync(self.target)
        self.cleared = True
        self.write()
        sync(self.folder)
        self._move()

    def announce(self, stamps: Mapping[str, str]) -> None:
        """Note the stamps of all files beside the shards, before the first of them is written."""
        self.stamps = dict(stamps)
        self.write()

    def publish(self, write_config: Callable[[Path], None]) -> None:
        """Give the new checkpoint its place, all of whose other files are written, and end the run.

        Args:
            write_config: writes ``config.json`` to a path, whole or not at all.
        """
        place = self._new / CONFIG if not self.cleared else self.target / CONFIG
        if not self.cleared:
            write_config(place)  # the last that may fail while the old checkpoint is there
            sync(self._new)
            self.clear()
        for folder in {(self.target / name).parent for name in self.names}:
            sync(folder)  # all names but the last
        if place.parent == self._new:
            place.replace(self.target / CONFIG)
        else:
            write_config(place)
        sync(self.target)
        self.end()

    def write(self) -> None:
        """Write ``run.json``, as things are now."""
        RunFile(
            self.fingerprint,
            self.settings,
            self.command,
            self.source,
            self.files,
            self.names,
            self.cleared,
            self.replaced,
            self.damaged,
            str(self.work.given) if self.work else None,
            self.stamps,
            self.shards,
        ).write(self.folder, self.target)

    def check_ours(self) -> None:
        """That no other run has taken the target over, while this one was at work.

        Raises:
            QuantizeError: if one has.
        """
        if not self._run.exists():
            return  # a folder that only this machine sees: whoever began the run will notice
        if read_json(self._run).get("fingerprint") != self.fingerprint:
            raise QuantizeError(
                f"{self._run}: another run has taken {self.target} over; let one run write to it"
            )

    def partial(self, name: str) -> Path:
        """Where the file ``name`` is written until it is complete."""
        # Of one process: where machines work together, one may take over from another that lives.
        return self.folder / f"{name}.{platform.node()}-{os.getpid()}.partial"

    def rounded(self, name: str) -> Path:
        """Where the shard ``name`` is until it is complete, if calibration writes into it: unlike
        :meth:`partial`, another process goes on with it."""
        return self.folder / f"{name}.rounded"

    def save_errors(self, name: str, errors: list[WeightError]) -> None:
        """Keep what the weights of shard ``name`` lost; before the shard gets its name."""
        self.shard_records.save(name, errors, self.partial(f"{name}.json"))

    def abandon(self, error: BaseException | None = None) -> None:
        """After a failure: leave nothing behind if there is nothing to resume from.

        Files of the source that ``error`` says are damaged may be repaired before it is resumed.
        """
        with suppress(OSError, QuantizeError):  # what went wrong before is what matters
            self.check_ours()
            begun = any(self.folder.glob(PATTERN))
            begun = begun or (self.calibration / "next.json").exists()
            begun = begun or (self.folder / MEASURED).exists() or self.source_files.exists()
            if self.cleared:
                begun = begun or {file.name for file in self.target.iterdir()} != {FOLDER}
            if not begun:
                self.end()
            elif isinstance(error, DamagedWeightsError):
                self.damaged.update(error.files)
                self.write()

    def end(self) -> None:
        """The run is over: its record goes."""
        if self.folder.exists():
            self._run.unlink(missing_ok=True)
            self._void()
            shutil.rmtree(self.folder / MEASURED, ignore_errors=True)
            (self.folder / LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # something is there that is not ours
                self.folder.rmdir()
        if self.work:
            self.work.remove()

    # -- how a run begins --------------------------------------------------------------------------

    def _adopt(self) -> None:
        try:
            found = RunFile.read(self.folder, self.target)
        except QuantizeError as error:
            raise QuantizeError(f"{error}; start again with --overwrite") from None
        if found.fingerprint != self.fingerprint:
            self.repaired = repaired(self.folder, found, self.settings, self.identity)
        ours = str(self.work.given) if self.work else None
        if found.work is not None and ours in (None, found.work):
            self.work = WorkDir(Path(found.work), self.target)
        elif found.work != ours:
            where = f"--work-dir {found.work}" if found.work else "without --work-dir"
            raise QuantizeError(
                f"{self._run}: the interrupted run was started {where}; go on so, or start again "
                "with --overwrite"
            )
        self.changed = {f for f, time in self.files.items() if found.files.get(f) != time}
        self.damaged = found.damaged
        self.command = found.command or self.command
        self.source = found.source or self.source
        self.cleared = found.cleared
        self.stamps = found.stamps
        found.shards = self.shards  # of the same plan, and surely ours
        check_links_among(self.target, self.names)
        self.replaced = replaced_by_same(self.target, self.names, found)
        self._adopts = True

    def _survey(self) -> None:
        self.replaced = replaced_by_new(self.target, self.folder, self.names)
        # Without an old checkpoint there is nothing to keep.
        self.cleared = not (self.replaced.delete or self.replaced.aside)
        self._adopts = False

    def _start(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._void_earlier_work()
            self._void()  # of an earlier run: void from here on
            self._found()
        except OSError as error:
            if not out_of_space(error):
                raise
            self.replaced.clear(self.target)  # the disk may be full of what is to be replaced
            self.cleared = True
            try:
                self._found()
            except OSError:
                self._run.unlink(missing_ok=True)
                self._void()
                raise
        if not self.cleared and not (self.target / CONFIG).exists():
            self.clear()  # nothing there is whole

    def _found(self) -> None:
        self.write()
        sync(self.folder)
        sync(self.target)
        self._new.mkdir(exist_ok=True)
        if self.identity:
            write_json(self.folder / SOURCE, self.identity._asdict())

    def _tidy(self) -> None:
        """Remove what an interrupted run has left and this one makes again; first what would make
        its target look whole."""
        self._new.mkdir(exist_ok=True)
        if self.work:
            self.work.make()
        if self.cleared:
            self.replaced.clear(self.target)
            self._move()
        for name in (CONFIG, INDEX, *self.names):
            if not name.endswith(".safetensors") or not self.shard_records.file(name).exists():
                for place in {self._new, self.place(name).parent} if "/" not in name else ():
                    (place / name).unlink(missing_ok=True)
        for file in (*self.folder.glob("*.partial"), *self.folder.glob("*.stop")):
            file.unlink()

    def _move(self) -> None:
        """Move new files to their places in the target, which must be cleared; all but the last."""
        for name in self.names:
            if name != CONFIG and (self._new / name).exists():
                (self.target / name).parent.mkdir(parents=True, exist_ok=True)
                (self._new / name).replace(self.target / name)

    def _void(self) -> None:
        """Remove what runs make in the record's folder, all but ``run.json`` and the lock."""
        for folder in ("new", "calibration", "source"):
            if (self.folder / folder).exists():
                shutil.rmtree(self.folder / folder)
        for pattern in (PATTERN, "*.partial", "*.rounded", "*.stop", SOURCE, SESSIONS):
            for file in self.folder.glob(pattern):
                file.unlink()

    def _void_earlier_work(self) -> None:
        """Remove what an earlier run has left in its ``--work-dir``."""
        with suppress(QuantizeError):
            if (found := RunFile.read(self.folder, self.target).work) is not None:
                WorkDir(Path(found), self.target).remove()
        if self.work:
            self.work.make()
