"""What a run leaves in its target while it is not finished, so that another can go on with it.

``DST/.nvfp4_moe/`` holds ``run.json`` (which run this is), files that are being written, and for
each finished shard one with what its weights lost, for the report. A run lasts as long as
``run.json`` is there; the folder goes when it is complete.

At any moment the run may be killed, or the machine lose its power. So every file gets its name in
one step, ``run.json`` comes before anything is changed and goes after everything is done, and what
a record says is believed only if it is whole.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantize.checkpoint.headers import INDEX
from quantize.checkpoint.json_files import read_json
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.layouts import config_files
from quantize.run import report_files
from quantize.run.files import write_json
from quantize.run.plan import Plan
from quantize.run.shards import is_complete
from quantize.run.weight_error import WeightError

FOLDER = ".nvfp4_moe"


class Record:
    """The record of a run in the folder ``target``.

    Args:
        fingerprint: ``Plan.fingerprint``.
        command: how the run was started, for the report; a resumed run keeps the first one's.
        source: what it reads, likewise.
        files: the source's files with their times of modification, in nanoseconds.
    """

    def __init__(
        self,
        target: Path,
        fingerprint: str,
        command: str = "",
        source: str = "",
        files: Mapping[str, int] | None = None,
    ) -> None:
        self.target = target
        self.folder = target / FOLDER
        self.fingerprint = fingerprint
        self.command = command
        self.source = source
        self.files = dict(files or {})
        self.changed: set[str] = set()
        self._run = self.folder / "run.json"

    @property
    def calibration(self) -> Path:
        """Where calibration keeps what it has made."""
        return self.folder / "calibration"

    def is_finished(self, plan: Plan, others: Sequence[Path] = ()) -> bool:
        """Whether the target already holds all that this run would make, ``others`` copied too."""
        config = self.target / "config.json"
        copies = {file: self.target / file.name for file in others}
        indexed = len(plan.shards) == 1 or (self.target / INDEX).exists()
        try:
            done = config.stat().st_mtime_ns
            same = all(a.stat().st_size == b.stat().st_size for a, b in copies.items())
        except OSError:
            return False
        if not (same and indexed) or any(changed > done for changed in self.files.values()):
            return False
        return (
            not self._run.exists()
            and all((self.target / name).exists() for name in plan.layout.extra_files([]))
            and report_files.are_of(self.target, self.fingerprint)
            and all(
                is_complete(self.target / name, plan.outputs(shard))
                for shard, name in enumerate(plan.file_names)
            )
        )

    def begin(self, overwrite: bool, resume: bool) -> None:
        """Prepare the target: empty, or with an interrupted run of the same plan.

        Raises:
            QuantizeError: if it holds anything else and ``overwrite`` is not set.
        """
        check_target(self.target, overwrite, resume)
        if resume and self._run.exists():
            self._adopt()
        elif resume and not _is_free(self.target):
            raise QuantizeError(
                f"{self.target} holds a checkpoint, but not a whole one of this source and these "
                "options, nor an interrupted run; pass --overwrite to replace it"
            )
        else:
            self._start()
        self._clear()

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

    def discard_changed(self, checkpoint: Checkpoint, plan: Plan) -> None:
        """Void the shards made from files of the source that have changed since, a repaired one
        for example; with calibration all, since each layer rests on those before it."""
        if not self.changed:
            return
        shutil.rmtree(self.calibration, ignore_errors=True)
        names = {
            name
            for name, info in checkpoint.stored.items()
            if str(info.file.resolve()) in self.changed
        }
        for shard, jobs in enumerate(plan.shards):
            read = {
                part for job in jobs for name in job.tensor_names for part in checkpoint.parts(name)
            }
            if plan.options.calibration or names & read:
                self._errors(plan.file_names[shard]).unlink(missing_ok=True)
                (self.target / plan.file_names[shard]).unlink(missing_ok=True)
        self._write()

    def missing(self, plan: Plan) -> list[int]:
        """The shards that are still to be made."""
        return [shard for shard in range(len(plan.shards)) if not self.is_done(plan, shard)]

    def is_done(self, plan: Plan, shard: int) -> bool:
        """Whether a shard is there, with the record of what its weights lost."""
        return (
            is_complete(self.target / plan.file_names[shard], plan.outputs(shard))
            and self._read_errors(plan, shard) is not None
        )

    def partial(self, name: str) -> Path:
        """Where the file ``name`` is written until it is complete."""
        # Of one process: where machines work together, one may take over from another that lives.
        return self.folder / f"{name}.{platform.node()}-{os.getpid()}.partial"

    def save_errors(self, name: str, errors: list[WeightError]) -> None:
        """Keep what the weights of shard ``name`` lost; before the shard gets its name."""
        # Sorted: the order in which threads finish is chance.
        write_json(self._errors(name), sorted(errors), self.partial(f"{name}.json"))

    def errors(self, plan: Plan) -> dict[str, WeightError]:
        """What all weights lost, by module path; for a run that misses nothing."""
        every: dict[str, WeightError] = {}
        for shard, name in enumerate(plan.file_names):
            found = self._read_errors(plan, shard)
            if found is None:
                raise QuantizeError(f"{self._errors(name)} was changed; pass --resume to repair it")
            every.update(found)
        return every

    def abandon(self) -> None:
        """After a failure: leave nothing behind if there is nothing to resume from."""
        with suppress(OSError, QuantizeError):  # what went wrong before is what matters
            self.check_ours()
            calibrated = (self.calibration / "next.json").exists()
            if not calibrated and [file.name for file in self.target.iterdir()] == [FOLDER]:
                shutil.rmtree(self.folder)

    def end(self) -> None:
        """The run is complete."""
        if self.folder.exists():
            self._run.unlink(missing_ok=True)
            shutil.rmtree(self.folder)

    def _adopt(self) -> None:
        try:
            found = read_json(self._run)
        except QuantizeError as error:
            raise QuantizeError(f"{error}; start again with --overwrite") from None
        if found.get("fingerprint") != self.fingerprint:
            raise QuantizeError(
                f"{self._run}: the interrupted run had another source, options or version of this "
                "package; use the same ones, or start again with --overwrite"
            )
        before = found.get("files")
        if isinstance(before, dict):
            self.changed = {f for f, time in self.files.items() if before.get(f, time) != time}
        self.command = str(found.get("command", self.command))
        self.source = str(found.get("source", self.source))

    def _start(self) -> None:
        for file in self.folder.iterdir() if self.folder.exists() else ():
            if file != self._run:  # of an earlier run: void from here on
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._clear()  # the disk may be full of what is to be replaced
            try:
                self.folder.mkdir(exist_ok=True)
                self._write()
            except OSError:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise

    def _write(self) -> None:
        run = {
            "fingerprint": self.fingerprint,
            "command": self.command,
            "source": self.source,
            "files": self.files,
        }
        write_json(self._run, run)

    def _clear(self) -> None:
        """Remove what is not this run's; first what makes an old checkpoint look whole."""
        for name in ("config.json", INDEX, *sorted(config_files())):
            (self.target / name).unlink(missing_ok=True)
        for file in self.target.glob("*.safetensors"):
            if not self._errors(file.name).exists():
                file.unlink()
        for file in (*self.folder.glob("*.partial"), *self.folder.glob("*.stop")):
            file.unlink()

    def _errors(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read_errors(self, plan: Plan, shard: int) -> dict[str, WeightError] | None:
        """What the weights of a shard lost; None if that is not known of each of them."""
        try:
            entries = json.loads(self._errors(plan.file_names[shard]).read_text(encoding="utf-8"))
            found = {entry[0]: _weight_error(*entry) for entry in entries}
        except (OSError, ValueError, TypeError, LookupError):
            return None
        made = [module for job in plan.shards[shard] for module in job.modules]
        return found if sorted(found) == sorted(made) else None


def check_target(target: Path, overwrite: bool, resume: bool) -> None:
    """Whether a run may use the folder ``target``, as far as can be said without its plan.

    Raises:
        QuantizeError: if not.
    """
    if target.exists() and not target.is_dir():
        raise QuantizeError(f"{target} is a file; the target must be a folder")
    if overwrite or _is_free(target):
        return
    interrupted = (target / FOLDER / "run.json").exists()
    if resume and (interrupted or (target / "config.json").exists()):
        return
    if interrupted:
        raise QuantizeError(
            f"{target} holds an interrupted run; pass --resume to go on with it, or --overwrite "
            "to start again"
        )
    if resume:
        raise QuantizeError(
            f"{target} holds no interrupted run ({FOLDER}/run.json): nothing to resume; pass "
            "--overwrite to replace what is there"
        )
    raise QuantizeError(f"{target} is not empty; pass --overwrite to replace its checkpoint")


def _is_free(target: Path) -> bool:
    """Whether nothing is there but, at most, what a run killed in its first moments leaves."""
    if not target.exists():
        return True
    names = {file.name for file in target.iterdir()}
    return names <= {FOLDER} and not (target / FOLDER / "run.json").exists()


def _weight_error(module: Any, noise: Any, signal: Any, counts: Any) -> WeightError:
    if isinstance(module, str) and isinstance(counts, list):
        return WeightError(module, float(noise), float(signal), [int(n) for n in counts])
    raise TypeError
