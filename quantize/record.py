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
from contextlib import suppress
from pathlib import Path
from typing import Any

from quantize.checkpoint import INDEX, read_json
from quantize.errors import QuantizeError
from quantize.jobs import WeightError
from quantize.plan import Plan
from quantize.shards import is_complete, write_json

FOLDER = ".nvfp4_moe"
REPORT = "nvfp4_moe_report.html"


class Record:
    """The record of a run in the folder ``target``.

    Args:
        fingerprint: ``Plan.fingerprint``.
        command: how the run was started, for the report; a resumed run keeps the first one's.
        source: what it reads, likewise.
    """

    def __init__(self, target: Path, fingerprint: str, command: str = "", source: str = "") -> None:
        self.target = target
        self.folder = target / FOLDER
        self.fingerprint = fingerprint
        self.command = command
        self.source = source
        self._run = self.folder / "run.json"

    @property
    def mark(self) -> str:
        """What the report of this run ends with."""
        return f"<!-- run {self.fingerprint} -->\n"

    def is_finished(self, plan: Plan) -> bool:
        """Whether the target already holds all that this run would make."""
        try:
            report = (self.target / REPORT).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return False
        return (
            not self._run.exists()
            and (self.target / "config.json").exists()
            and report.endswith(self.mark)
            and all(
                is_complete(self.target / name, plan.outputs(shard))
                for shard, name in enumerate(plan.names)
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

    def missing(self, plan: Plan) -> list[int]:
        """The shards that are still to be made."""
        return [shard for shard in range(len(plan.shards)) if not self.is_done(plan, shard)]

    def is_done(self, plan: Plan, shard: int) -> bool:
        """Whether a shard is there, with the record of what its weights lost."""
        return (
            is_complete(self.target / plan.names[shard], plan.outputs(shard))
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
        for shard, name in enumerate(plan.names):
            found = self._read_errors(plan, shard)
            if found is None:
                raise QuantizeError(f"{self._errors(name)} was changed; pass --resume to repair it")
            every.update(found)
        return every

    def abandon(self) -> None:
        """After a failure: leave nothing behind if there is nothing to resume from."""
        with suppress(OSError):  # what went wrong before is what matters
            if [file.name for file in self.target.iterdir()] == [FOLDER]:
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
        self.command = str(found.get("command", self.command))
        self.source = str(found.get("source", self.source))

    def _start(self) -> None:
        for file in self.folder.iterdir() if self.folder.exists() else ():
            if file != self._run:  # of an earlier run: void from here on
                shutil.rmtree(file) if file.is_dir() else file.unlink()
        run = {"fingerprint": self.fingerprint, "command": self.command, "source": self.source}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self._run, run)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._clear()  # the disk may be full of what is to be replaced
            try:
                self.folder.mkdir(exist_ok=True)
                write_json(self._run, run)
            except OSError:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise

    def _clear(self) -> None:
        """Remove what is not this run's; first what makes an old checkpoint look whole."""
        for name in ("config.json", INDEX, "hf_quant_config.json"):
            (self.target / name).unlink(missing_ok=True)
        for file in self.target.glob("*.safetensors"):
            if not self._errors(file.name).exists():
                file.unlink()
        for file in self.folder.glob("*.partial"):
            file.unlink()

    def _errors(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read_errors(self, plan: Plan, shard: int) -> dict[str, WeightError] | None:
        """What the weights of a shard lost; None if that is not known of each of them."""
        try:
            entries = json.loads(self._errors(plan.names[shard]).read_text(encoding="utf-8"))
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
