"""How far a calibration has come: in a file, so that another run can go on with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from quantize.calibration.layerwise import LayerwiseModel
from quantize.calibration.store import Store
from quantize.checkpoint.json_files import read_json
from quantize.errors import QuantizeError
from quantize.experts.group import ExpertGroup
from quantize.run.files import sync, write_json

if TYPE_CHECKING:
    from quantize.run.plan import Plan

PROGRESS = "next.json"
"""The name of the file, beside the folder of states."""

Progress = Callable[[float, int, str], None]
"""Is told how many steps are done, parts included, how many there are, and where the run is. A step
is a layer that is run forward, a layer that is run backward, or the model's end."""


class CalibrationProgress:
    """How far a calibration has come.

    Attributes:
        first, last: the first and the last layer that have experts to be quantized.
        undone: the layers of these experts that are not staged yet.
        steps: how many steps the whole calibration has.
        done: how many of them are done.
    """

    def __init__(
        self,
        plan: Plan,
        model: LayerwiseModel,
        store: Store,
        undone: list[ExpertGroup],
        progress: Progress,
    ) -> None:
        self._file = store.folder.parent / PROGRESS
        self._model, self._store = model, store
        self._progress = progress
        layers = [model.layer_of(group) for group in plan.groups]
        self.first, self.last = min(layers), max(layers)
        self.undone = [model.layer_of(group) for group in undone]
        self.steps = self.done = 0
        self._where = ""

    def resume(self, steps: int, needed: Callable[[int], list[str]], limit: int) -> None:
        """Go on where an earlier run stopped, if it left behind what is needed; else begin.

        Args:
            steps: how many there are.
            needed: takes the number of steps that are done, and returns the prefixes of the
                store's tensors that all later steps need.
            limit: so many steps may be skipped; there is something to be quantized after them.

        Raises:
            QuantizeError: if the earlier run computed in another precision.
        """
        self.steps = steps
        dtype = str(self._model.dtype)
        if self._file.exists():
            found = read_json(self._file)
            if found.get("dtype") != dtype:
                raise QuantizeError(
                    f"{self._file}: the run was begun in {found.get('dtype')} and this device "
                    f"computes in {dtype}; go on where it was begun (--device), or start "
                    "again with --overwrite"
                )
            done, forms = found.get("done", 0), found.get("return_forms")
            # Where something is damaged, all layers are run again; what is staged stays.
            if done <= limit and found.get("steps") == steps and forms is not None:
                names = [self._store.names(prefix) for prefix in needed(done)]
                if all(names) and all(
                    self._store.is_whole(name) for part in names for name in part
                ):
                    self.done = done
                    self._model.return_forms = {int(layer): form for layer, form in forms.items()}
        self._store.remove_all_but(needed(self.done) if self.done else [])

    def start_step(self, where: str) -> None:
        """Say that the next step begins, which is at ``where``."""
        self._where = where
        self._progress(self.done, self.steps, where)

    def report(self, share: float, part: str) -> None:
        """Say that this share of the present step is done, up to and with ``part``."""
        self._progress(self.done + share, self.steps, f"{self._where}, {part}")

    def finish_step(self, written: str) -> None:
        """Record that a step is done, which has written the tensors with the prefix ``written``."""
        for name in self._store.names(written):
            sync(self._store.folder / name)
        self.done += 1
        forms = {str(layer): form for layer, form in self._model.return_forms.items()}
        write_json(
            self._file,
            {
                "done": self.done,
                "steps": self.steps,
                "return_forms": forms,
                "dtype": str(self._model.dtype),
            },
        )

    def finish(self) -> None:
        """Say that all steps are done."""
        self._progress(self.steps, self.steps, "done")
