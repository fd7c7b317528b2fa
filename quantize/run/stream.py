"""A run whose source comes from the hub a few files at a time: one shard of the output is a step.

Shards are made one after another, and not several at once: so no more of the source is needed at a
time than one shard is made from. A file of the source goes when the last shard that is made from it
has its name. A run that is killed therefore downloads again only what the shard that it was at
needs, and not even that where it lies in the record's folder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from quantize.checkpoint.identity import Identity, tensor_digests
from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.streamed import Steps, Streamed, peak
from quantize.run.plan import Plan
from quantize.run.record import Record


def streamed(checkpoint: Checkpoint) -> Streamed | None:
    """The weights of a source that comes so; None if it is on this machine."""
    return checkpoint.weights if isinstance(checkpoint.weights, Streamed) else None


class Stream:
    """The downloads of a run, while it makes ``shards``; a context manager.

    Args:
        shards: numbers of the shards that are made, in this order.
        say: is told, in any thread, what a download waits for.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        record: Record,
        shards: Sequence[int],
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        weights = streamed(checkpoint)
        assert weights is not None
        self._weights = weights
        self._checkpoint = checkpoint
        self._folder = record.source_files
        self._shards = list(shards)
        self._say = say
        self._steps = steps_of(checkpoint, plan, shards, weights, self._folder)

    def __enter__(self) -> Stream:
        close = self._checkpoint.close
        self._weights.begin(self._folder, self._steps, self._note, close, self._say)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        self._weights.wait()

    def await_turn(self, shard: int) -> None:
        """Return when the shard may be begun."""
        self._weights.await_step(self._shards.index(shard))

    def finished(self, shard: int) -> None:
        """Note that a shard has its name."""
        self._weights.finished(self._shards.index(shard))

    def stop(self) -> None:
        """Let no thread wait for a file any more."""
        self._weights.stop()

    def identify(self, identity: Identity) -> Identity:
        """The source's identity with what was noted of all its files, once all were here."""
        last = len(self._shards)
        if last < len(self._steps):  # files that no shard is made from: they are noted, too
            for name in sorted(self._steps[last]):
                self._weights.await_file(name)
            self._weights.finished(last)
        return identity._replace(tensors=self._weights.noted)

    def _note(self, path: Path) -> dict[str, str]:
        infos = [t for t in self._checkpoint.stored.values() if t.file.name == path.name]
        found = tensor_digests(info._replace(file=path) for info in infos)
        return found.get(path.name, {})


def steps_of(
    checkpoint: Checkpoint, plan: Plan, shards: Sequence[int], weights: Streamed, folder: Path
) -> Steps:
    """The files that each of ``shards`` is made from; a last step has those that were never here
    and that none is made from, if there are any."""
    stored = checkpoint.stored
    steps = [{stored[n].file.name for n in plan.reads(checkpoint, shard)} for shard in shards]
    known = {name for step in steps for name in step}
    rest = {n for n in weights.names if n not in known and not weights.has_note(folder, n)}
    return [*steps, rest] if rest else steps


def bytes_beside(checkpoint: Checkpoint, plan: Plan, record: Record, shards: Sequence[int]) -> int:
    """How many more bytes than ``shards`` take are on the disk at any time while they are made:
    files of the source, beside those of the output that are there by then. 0 if the source is on
    this machine anyway."""
    weights = streamed(checkpoint)
    if weights is None:
        return 0
    folder = record.source_files
    sizes = {name: file.size for name, file in weights.model.files.items()}
    made = [sum(out.nbytes for out in plan.outputs(shard)) for shard in shards]
    most = peak(steps_of(checkpoint, plan, shards, weights, folder), sizes, made)
    there = (folder / name for name in weights.names)  # of an interrupted run
    return max(0, most - sum(made) - sum(f.stat().st_size for f in there if f.is_file()))
