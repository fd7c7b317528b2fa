"""What a run leaves in its target while it is not finished, so that another can go on with it.

``DST/.nvfp4_moe/`` holds ``run.json`` (which run this is), the shards that are being written, and
for each finished one a file with what its weights lost, for the report. The folder goes when the
run is complete.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path

from quantize.checkpoint import INDEX, read_json
from quantize.errors import QuantizeError
from quantize.jobs import WeightError
from quantize.plan import Plan
from quantize.shards import is_complete, write_json

FOLDER = ".nvfp4_moe"


class Record:
    """The record of a run in the folder ``target``.

    Args:
        fingerprint: ``Plan.fingerprint``.
        command: how the run was started, for the report; a resumed run keeps the first one's.
    """

    def __init__(self, target: Path, fingerprint: str, command: str = "") -> None:
        self.target = target
        self.folder = target / FOLDER
        self.fingerprint = fingerprint
        self.command = command

    def begin(self, overwrite: bool, resume: bool) -> None:
        """Prepare the target: empty, or with an interrupted run of the same plan.

        Raises:
            QuantizeError: if it holds anything else and ``overwrite`` is not set.
        """
        check_target(self.target, overwrite, resume)
        run = self.folder / "run.json"
        if resume and run.exists():
            found = read_json(run)
            if found.get("fingerprint") != self.fingerprint:
                raise QuantizeError(
                    f"{run}: the interrupted run had another source, options or version of this "
                    "package; use the same ones, or start again with --overwrite"
                )
            self.command = str(found.get("command", self.command))
            for partial in self.folder.glob("*.partial"):
                partial.unlink()
            return
        if self.target.exists():
            # What makes an old checkpoint look whole goes first.
            for name in ("config.json", INDEX, "hf_quant_config.json"):
                (self.target / name).unlink(missing_ok=True)
            for file in self.target.glob("*.safetensors"):
                file.unlink()
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        try:
            write_json(run, {"fingerprint": self.fingerprint, "command": self.command})
        except OSError:
            shutil.rmtree(self.folder)
            raise

    def missing(self, plan: Plan) -> list[int]:
        """The shards that are still to be made."""
        return [
            shard
            for shard, name in enumerate(plan.names)
            if not self._errors(name).exists()
            or not is_complete(self.target / name, plan.outputs(shard))
        ]

    def partial(self, name: str) -> Path:
        """Where the shard ``name`` is written until it is complete."""
        # Of one process: where machines work together, one may take over from another that lives.
        return self.folder / f"{name}.{platform.node()}-{os.getpid()}.partial"

    def save_errors(self, name: str, errors: list[WeightError]) -> None:
        """Keep what the weights of shard ``name`` lost; before the shard gets its name."""
        # Sorted: the order in which threads finish is chance.
        write_json(self._errors(name), sorted(errors))

    def errors(self, plan: Plan) -> dict[str, WeightError]:
        """What all weights lost, by module path."""
        every: dict[str, WeightError] = {}
        for name in plan.names:
            for entry in json.loads(self._errors(name).read_text(encoding="utf-8")):
                every[entry[0]] = WeightError(*entry)
        return every

    def abandon(self) -> None:
        """After a failure: leave nothing behind if there is nothing to resume from."""
        if not any(self.target.glob("*.safetensors")):
            shutil.rmtree(self.folder, ignore_errors=True)

    def end(self) -> None:
        """The run is complete."""
        shutil.rmtree(self.folder)

    def _errors(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def check_target(target: Path, overwrite: bool, resume: bool) -> None:
    """Whether a run may use the folder ``target``.

    Raises:
        QuantizeError: if not.
    """
    if target.exists() and not target.is_dir():
        raise QuantizeError(f"{target} is a file; the target must be a folder")
    if not target.exists() or overwrite or not any(target.iterdir()):
        return
    interrupted = (target / FOLDER / "run.json").exists()
    if resume and interrupted:
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
