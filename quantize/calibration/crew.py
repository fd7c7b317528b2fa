"""Rounding experts on several devices at once.

A layer's experts are independent once it is known what they are given, and the model goes on with
the original weights. So the pass through the model stays where it is, and hands experts to whatever
is free: each member of a crew rounds one batch at a time, in a thread of its own. What a member
makes of an expert depends on the expert alone. So results do not depend on how many members there
are, nor on which of them did what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol

import torch

from quantize.calibration.expert_weights import ExpertWeights
from quantize.calibration.proof import Say
from quantize.calibration.room import side_by_side
from quantize.calibration.routing import Routing
from quantize.errors import QuantizeError, first_line
from quantize.experts.group import ExpertGroup
from quantize.nvfp4.input_scales.magnitudes import Magnitudes
from quantize.nvfp4.rounding.method import Method


class Work(NamedTuple):
    """Some experts of one group, by their numbers, and the tokens of all of the group's."""

    group: ExpertGroup
    experts: Sequence[tuple[int, ExpertWeights]]
    routing: Routing


class Outcome(NamedTuple):
    """What became of one expert.

    Attributes:
        number: the expert's.
        tokens, rule, before, after, lost: see ``quantize.run.staged.Findings``.
        magnitudes: of the inputs of gate and up, and of down.
        tensors: what is to be written, by name, on the host.
    """

    number: int
    tokens: int
    rule: str
    magnitudes: tuple[Magnitudes, Magnitudes]
    before: list[float]
    after: list[float]
    lost: list[list[Any]]
    tensors: dict[str, torch.Tensor]


Round = Callable[[Work], list[Outcome]]
Take = Callable[[list[Outcome]], None]
"""Is given what became of some experts; several threads call it."""


class LostError(Exception):
    """A member cannot go on, for a reason that another one need not have."""


class Member(Protocol):
    """What rounds a batch of experts at a time.

    Attributes:
        name: for messages.
    """

    name: str

    def round(self, work: Work) -> list[Outcome]:
        """Round some experts.

        Raises:
            LostError: if this member fails, and not the experts.
        """

    def rest(self) -> None:
        """Drop what was kept of a layer: it is done."""

    def stop(self) -> None:
        """Give up what is being rounded, if that is possible."""


class Device:
    """A device of this machine as a member of a crew.

    Args:
        rounds: rounds experts, on the device that they are on.
    """

    def __init__(self, rounds: Round, device: torch.device) -> None:
        self.name = str(device)
        self._round = rounds
        self._device = device
        # One for all batches: memory that a GPU's stream has freed is there for that stream alone.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._from: Routing | None = None
        self._routing: Routing | None = None

    def round(self, work: Work) -> list[Outcome]:
        """See :class:`Member`. Experts that do not fit together are rounded one by one."""
        found = self._attempt(work)
        if isinstance(found, list):
            return found
        self.rest()
        if self._device.type == "cuda":
            with suppress(Exception):  # after some errors, a GPU does not even do this
                torch.cuda.empty_cache()
        if isinstance(found, torch.OutOfMemoryError) and len(work.experts) > 1:
            alone = (Work(work.group, [expert], work.routing) for expert in work.experts)
            return [outcome for each in alone for outcome in self.round(each)]
        raise LostError(f"{type(found).__name__}: {first_line(found)}")

    def _attempt(self, work: Work) -> list[Outcome] | Exception:
        """What became of the experts; or how the device failed, without a traceback, which would
        keep tensors alive."""
        try:
            with torch.no_grad(), self._at_work():
                if work.routing is not self._from:
                    self._from, self._routing = work.routing, work.routing.on(self._device)
                assert self._routing is not None
                experts = [(number, weights.on(self._device)) for number, weights in work.experts]
                return self._round(Work(work.group, experts, self._routing))
        except Exception as error:
            if not of_the_device(error):
                raise
            return error.with_traceback(None)

    def rest(self) -> None:
        """See :class:`Member`."""
        self._from = self._routing = None

    def stop(self) -> None:
        """A device goes on to the end of its batch."""

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Within, a GPU's work goes into a stream of its own: what the pass through the model
        computes on the same GPU need not wait for it."""
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device):
            # Weights and tokens that are there already came by the pass' stream.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                yield


class Crew:
    """Members that round experts; a context, in which they have threads.

    Args:
        say: is told of members that are lost; the others round their experts.
        together: of a group, how many experts make a batch.
    """

    def __init__(
        self, members: Sequence[Member], say: Say, together: Callable[[ExpertGroup, Method], int]
    ) -> None:
        self.together = together
        self._say = say
        self._free = list(members)
        self._busy: dict[Future[None], tuple[Member, Work, Take]] = {}
        self._pool = ThreadPoolExecutor(len(members), "round")

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._pool.shutdown()

    @property
    def at_work(self) -> int:
        """How many experts are being rounded."""
        return sum(len(w.experts) for future, (_, w, _) in self._busy.items() if not future.done())

    def give(self, work: Work, take: Take) -> None:
        """Let experts be rounded by the first member that is free, and ``take`` be given what
        became of them. Returns as soon as a member has begun.

        Raises:
            QuantizeError: if rounding any experts failed, or no member is left.
        """
        while not self._free:
            self._wait()
        member = self._free.pop(0)
        future = self._pool.submit(lambda: take(member.round(work)))
        self._busy[future] = member, work, take

    def finish(self) -> None:
        """Wait until all experts are rounded.

        Raises:
            QuantizeError: as :meth:`give`.
        """
        while self._busy:
            self._wait()
        for member in self._free:
            member.rest()

    def stop(self) -> None:
        """Round nothing any more: returns once no member is at work."""
        for member, _, _ in self._busy.values():
            member.stop()
        wait(self._busy)
        self._free += [member for member, _, _ in self._busy.values()]
        self._busy.clear()

    def _wait(self) -> None:
        """Until a member is free again, or is lost and another one has begun its experts."""
        done, _ = wait(self._busy, return_when=FIRST_COMPLETED)
        lost: list[tuple[Work, Take]] = []
        for future in done:
            member, work, take = self._busy.pop(future)
            try:
                future.result()
            except LostError as error:
                lost.append((work, take))
                if not (self._free or self._busy):
                    raise self._none_left(work, member, error) from None
                self._say(f"Warning: {member.name} is lost ({error}); others round its experts")
            else:
                self._free.append(member)
        for each in lost:
            self.give(*each)

    def _none_left(self, work: Work, member: Member, error: LostError) -> QuantizeError:
        numbers = ", ".join(str(work.group.first + number) for number, _ in work.experts)
        return QuantizeError(
            f"{work.group.prefix}: nothing is left that could round expert {numbers}: "
            f"{member.name} is lost too ({error}). Choose other devices with --device, or shorter "
            "texts (--calibration-length), and go on with --resume"
        )


def on_devices(rounds: Round, devices: Sequence[torch.device], say: Say) -> Crew:
    """Devices of this machine as a crew."""
    return Crew(
        [Device(rounds, device) for device in devices],
        say,
        lambda group, method: side_by_side(group, method, devices),
    )


def of_the_device(error: Exception) -> bool:
    """Whether a GPU failed or has no memory left."""
    kinds: tuple[Any, ...] = (torch.OutOfMemoryError, torch.AcceleratorError)
    words = ("CUDA", "cuBLAS", "CUBLAS", "cusolver", "CUSOLVER")
    return isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )
