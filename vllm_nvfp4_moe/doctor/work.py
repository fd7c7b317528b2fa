"""What is done to one kernel, in a process of its own: run beside plain arithmetic, then timed."""

from __future__ import annotations

import fcntl
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_nvfp4_moe.doctor.cases import (
    Case,
    all_cases,
    judged,
    make_batch,
    make_weights,
    some,
    together,
)
from vllm_nvfp4_moe.doctor.compiling import READY, Spent, preparing
from vllm_nvfp4_moe.doctor.diagnosis import Judge, named, single_scale
from vllm_nvfp4_moe.doctor.inputs import Batch, batches
from vllm_nvfp4_moe.doctor.kernels import VARIANTS, told
from vllm_nvfp4_moe.doctor.layer import Layer, Way, build, make, one_rank
from vllm_nvfp4_moe.doctor.reference import Rounding, faults, outputs
from vllm_nvfp4_moe.doctor.reference_files import (
    JUDGED,
    load_reference,
    reference_file,
    save_reference,
)
from vllm_nvfp4_moe.doctor.scan import ENOUGH
from vllm_nvfp4_moe.doctor.shape import Shape, active_experts
from vllm_nvfp4_moe.doctor.timing import WARM, Pass, time_on_cpu, time_on_gpu
from vllm_nvfp4_moe.self_check import BOUNDS, error_of, nearer_to

AGAIN = (1, 64)
"""Numbers of tokens with which a kernel is tried once more, if it does with 4-bit activations what
it does without."""
ROUNDS = 15
_SECONDS = {"cpu": 1.0, "cuda": 1.0}
"""That timing one number of tokens may take, by device, if that is two rounds or more."""
_CALLS_ON_CPUS = 4
"""With different experts, if there are few tokens; with many, all experts' weights are read."""
_AGAIN_COSTS = 0.2
"""Of a layer's time, what it takes to try it in another variant."""
_MORE = 99
"""Inputs that no other call has (``make_batch``)."""
_WAITS = 30.0
"""Seconds that times wait for a process that makes ready; less than what hangs is given."""
_NAMED = 3
"""Wrong outputs of a layer that are looked into."""
_CHECKS = 0.6
"""Of the time that a layer has, what checks may take."""

Emit = Callable[[dict[str, Any]], None]
Seen = tuple[Batch, torch.Tensor, torch.Tensor]
"""Tokens, a kernel's outputs for them, and the right ones."""


@dataclass(frozen=True)
class Job:
    """What to do.

    Attributes:
        name: of the kernel.
        shapes: by place: ``whole``, ``slice``.
        runnable: (place, variant) of all that could run.
        tokens: numbers of tokens.
        deadline: on the monotonic clock: what does not fit is left out.
        folder: for what processes share, the reference's outputs.
    """

    name: str
    way: Way
    shapes: Mapping[str, Shape]
    runnable: tuple[tuple[str, str], ...]
    tokens: tuple[int, ...]
    device: torch.device
    deadline: float
    folder: Path


def examine(job: Job, emit: Emit) -> None:
    """Do it; what is found is given to ``emit``, one thing after the other, so that it is not lost
    when the process dies."""
    done: dict[str, str] = {}
    deadline = job.deadline
    with one_rank(job.device):
        for number, (place, variant) in enumerate(job.runnable):
            if place in done and time.monotonic() > deadline:
                continue  # it is known there, and most likely does the same here
            costs = [
                (_AGAIN_COSTS if p in done else 1.0) * job.shapes[p].weights
                for p, _ in job.runnable[number:]
            ]
            left = max(0.0, deadline - time.monotonic())
            until = time.monotonic() + left * costs[0] / sum(costs)
            told_of = {"place": place, "variant": variant}
            emit({"what": "begins", **told_of, "at": "building the layer"})
            spent = Spent()
            try:
                with preparing(READY, emit, **told_of) as spent:
                    part = _Part(job, place, variant, until, emit)
                    part.warm()
                part.until += spent.compiling
                part.run(again=done.get(place))
                if not part.layer.method.quantizes_activations:
                    done[place] = part.layer.kernel
            except Exception as error:
                message = f"{type(error).__name__}: {told(error)}"
                emit({"what": "failed", **told_of, "message": message})
                if not _works(job.device):
                    raise
            deadline += spent.compiling
            part = None  # type: ignore[assignment]
            if number + 1 < len(job.runnable):
                gc.collect()
            if job.device.type == "cuda":
                torch.cuda.empty_cache()


def examine_when_told(
    way: Way, shape: Shape, device: torch.device, folder: Path, told: Any, emit: Emit
) -> None:
    """:func:`examine` a job that comes later; until then, begin what takes seconds of each process
    and little of the device: its contexts, and the modules that ``way`` needs.

    Args:
        shape: of any layer that the kernel could run.
        told: whose ``get()`` waits for the job.
    """
    with ExitStack() as stack:
        with alone(folder):
            stack.enter_context(one_rank(device))
            with suppress(Exception):  # it comes again where it is told of
                make(shape, way, torch.device("meta"))
        examine(told.get(), emit)


@contextmanager
def alone(folder: Path, most: float = math.inf) -> Iterator[float]:
    """Within, no other process of doctor's makes ready or takes times. A process that dies lets
    others go on.

    Args:
        most: seconds to wait for that at most: one that hangs must not hold up the others.

    Yields:
        the seconds waited.
    """
    begin = time.monotonic()
    with (folder / "alone").open("w") as file:
        while True:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            if time.monotonic() - begin > most:
                break
            time.sleep(0.05)
        yield time.monotonic() - begin


def _works(device: torch.device) -> bool:
    """Whether the device still runs anything."""
    try:
        return bool((torch.ones(2, device=device).sum() == 2).item())
    except RuntimeError:
        return False


class _Part:
    """One layer: a shape and a variant."""

    def __init__(self, job: Job, place: str, variant: str, until: float, emit: Emit) -> None:
        self.job, self.place, self.variant = job, place, variant
        self.shape, self.until = job.shapes[place], until
        self._emit = emit
        self.weights = make_weights(self.shape, job.device)
        w = self.weights
        self.layer: Layer = build(
            self.shape, w.w13, w.w2, job.way, w.biases, variant == VARIANTS[0], w.input_scales
        )
        method = self.layer.method
        self.rounding = rounding_of(method, job.way)
        bits = method.activation_bits
        bound = BOUNDS[bits]
        self.judge = Judge(self.weights, self.rounding, bound)
        self.emit(
            "built", kernel=self.layer.kernel, activation_bits=bits, bound=list(bound[:2]),
            monolithic=bool(method.is_monolithic),
        )  # fmt: skip

    def emit(self, what: str, **more: Any) -> None:
        self._emit({"what": what, "place": self.place, "variant": self.variant, **more})

    def warm(self) -> None:
        """Call it with each number of tokens: on GPUs, kernels are chosen by that, and compiled
        when they are first called. Otherwise how long a call takes would be judged by this one."""
        on_gpu = self.job.device.type == "cuda"
        for count in self.job.tokens if on_gpu else self.job.tokens[:1]:
            self.emit("begins", at=f"the first call, {count} tokens")
            given = make_batch(self.shape, Case(count, "uniform"), self.job.device)
            try:
                self.layer(self.layer.routed(given))
                if on_gpu:
                    torch.cuda.synchronize()
            except Exception:
                return  # the checks come to it as well, and say what was right before

    def run(self, again: str | None) -> None:
        """Check and time it.

        Args:
            again: the name of the kernel that has run this shape in the other variant, without
                4-bit activations.
        """
        same = again == self.layer.kernel
        tokens = [n for n in self.job.tokens if not same or n in AGAIN]
        cases = all_cases(tokens)
        if same:
            self.emit("same", as_variant=VARIANTS[0], tokens=tokens)
        share = 1.0 if same else _CHECKS
        end = time.monotonic() + share * max(0.0, self.until - time.monotonic())
        right, seen, unnamed = self.check(cases, end)
        if right and not same:
            with alone(self.job.folder, _WAITS) as waited:
                self.until += waited
                self.time()
        # Last: on a CPU it takes seconds, however few are left, and times would miss them.
        if unnamed or (seen and right and not same):
            self._together(seen, unnamed)

    # -- right or wrong ---------------------------------------------------------------------------

    def check(self, cases: list[Case], end: float) -> tuple[bool, list[Seen], bool]:
        """Each case beside plain arithmetic.

        Returns:
            Whether all is right, what was seen, and whether something is wrong without a name.
        """
        job = self.job
        file = reference_file(job.folder, self.place, self.rounding)
        if not file.exists():
            self.emit("begins", at="computing the reference")
            save_reference(file, self.weights, self.rounding, job.tokens, job.device)
        every_truth = load_reference(file, job.tokens, job.device)
        seen: list[Seen] = []
        a_token = 0.0
        right, tried, found = True, 0, 0
        for case in cases:
            now = time.monotonic()
            always = case.tokens in AGAIN and case.routing == "uniform"
            if now + a_token * case.tokens > end and not always:
                self.emit("left out", tokens=case.tokens, routing=case.routing)
                continue
            at = judged(case.tokens, JUDGED[self.job.device.type])
            given = make_batch(self.shape, case, self.job.device)
            asked = some(given, at)
            for kernel, taking in self._every_kernel(case):
                at_name = f"{case}{f' ({kernel})' if kernel else ''}"
                self.emit("begins", at=at_name)
                begin = time.monotonic()
                with taking:
                    out = self.layer(self.layer.routed(given))[at.to(given.x.device)].float()
                    out = out.clone()
                a_token = (time.monotonic() - begin) / case.tokens
                truth = every_truth[case]
                error = error_of(out, truth)
                good = self.judge.right(out, truth)
                fault = None
                if not good and tried < _NAMED:
                    tried += 1
                    fault = self._router(given) or named(self.judge, asked, out)
                    found += fault is not None
                right = right and good
                self.emit(
                    "checked", tokens=case.tokens, routing=case.routing, tile=kernel,
                    judged=len(at), token_error=_number(error.token),
                    value_error=_number(error.value), right=good, fault=fault,
                )  # fmt: skip
            seen.append((asked, out, truth))
        return right, seen, tried > found

    def _together(self, seen: list[Seen], unnamed: bool) -> None:
        """All cases together: what one alone cannot tell, single wrong scales above all.

        Args:
            unnamed: something is wrong, and nobody knows what.
        """
        self.emit("begins", at="looking for single wrong scales")
        if unnamed:
            seen = [*seen, *self._more(sum(len(out) for _, out, _ in seen))]
        given = together(batch for batch, _, _ in seen)
        out, truth = (torch.cat(part) for part in list(zip(*seen, strict=True))[1:])
        fault = None
        if self.layer.method.activation_bits < 16 and not unnamed:
            fault = self._nearer(given, out, truth)
        fault = fault or single_scale(self.judge, given, out, truth)
        if unnamed:
            fault = fault or "no known fault gives this output"
        tokens = given.ids.flatten().long().bincount(minlength=self.shape.experts)
        self.emit(
            "compared", judged=len(out), experts=int((tokens >= ENOUGH).sum()), right=fault is None,
            fault=fault,
        )  # fmt: skip

    def _more(self, judged: int) -> list[Seen]:
        """More tokens, all of them compared, where ``judged`` are too few for each expert to have
        ``ENOUGH``: what is wrong is worth a name, also where time was short."""
        lacking = 2 * ENOUGH * self.shape.experts // self.shape.top_k - judged
        if lacking <= 0:
            return []
        given = make_batch(self.shape, Case(lacking, "uniform"), self.job.device, _MORE)
        out = self.layer(self.layer.routed(given)).float().clone()
        (truth,) = outputs(self.weights, given, self.rounding)
        return [(given, out, truth)]

    def _nearer(self, given: Batch, out: torch.Tensor, truth: torch.Tensor) -> str | None:
        """A known fault whose result is nearer than the right one: with few bits, both may be
        within the bound."""
        few = torch.linspace(0, len(out) - 1, min(len(out), 256)).long().to(out.device)
        candidates = list(faults(self.weights, self.rounding))
        results = outputs(self.weights, some(given, few), self.rounding, candidates)
        out, truth = out[few], truth[few]
        apart = 0.2 * float((out - truth).norm())
        near = [
            (nearer_to(out, truth, result), fault.name)
            for fault, result in zip(candidates, results, strict=True)
            if float((result - truth).norm()) > apart
        ]
        best = max(near, default=(0.0, ""))
        return best[1] if best[0] > 0 else None

    def _every_kernel(self, case: Case) -> list[tuple[str, Any]]:
        """Each kernel that the method may choose among, if it says which; with uniform routing."""
        every = list(self.layer.method.every_kernel())
        if case.routing == "uniform" and case.tokens in (1, 64, 1024) and every[0][0]:
            return every
        return [("", nullcontext())]

    def _router(self, given: Batch) -> str | None:
        """How vLLM's router chooses otherwise than plain arithmetic."""
        routed = self.layer.routed(given)
        order, theirs = given.ids.argsort(1), routed.ids.argsort(1)
        ids, others = given.ids.gather(1, order), routed.ids.gather(1, theirs)
        if not torch.equal(ids, others.to(ids)):
            return "vLLM's router chooses other experts"
        weights = routed.weights.gather(1, theirs)
        if not torch.allclose(weights, given.weights.gather(1, order), rtol=1e-2, atol=1e-4):
            return "vLLM's router gives the experts other weights"
        return None

    # -- how fast ---------------------------------------------------------------------------------

    def time(self) -> None:
        """Milliseconds of a call by number of tokens, uniformly routed."""
        device = self.job.device.type
        timer = time_on_gpu if device == "cuda" else time_on_cpu
        a_token = 0.0
        for tokens in self.job.tokens:
            calls = batches(tokens) if device == "cuda" else _CALLS_ON_CPUS if tokens < 32 else 1
            if time.monotonic() + (WARM + 2) * calls * tokens * a_token > self.until:
                self.emit("left out", tokens=tokens, routing="timing")
                continue
            self.emit("begins", at=f"timing {tokens} tokens")
            case = Case(tokens, "uniform")
            given = [
                self.layer.routed(make_batch(self.shape, case, self.job.device, 1 + number))
                for number in range(calls)
            ]
            made = {"": Pass(self.layer, given)}
            made[""].capture()
            begin = time.monotonic()
            timer(made, 1)
            once = time.monotonic() - begin
            room = min(_SECONDS[device], max(0.0, self.until - time.monotonic()))
            rounds = max(2, min(ROUNDS, int(room / max(once, 1e-9)) - 1))
            timer(made, 1 if once * WARM > room else WARM)
            values = [ms / calls for ms in timer(made, rounds)[""]]
            a_token = once / calls / tokens
            self.emit(
                "timed", tokens=tokens, ms=statistics.median(values),
                quartiles=statistics.quantiles(values, n=4)[::2], rounds=rounds,
                active=statistics.fmean(active_experts(each.ids) for each in given),
            )  # fmt: skip


def rounding_of(method: Any, way: Way) -> Rounding:
    """How the kernel of a layer's method rounds, as far as is known."""
    return Rounding(
        nvfp4=bool(method.quantizes_activations),
        by_expert=bool(method.input_scales_by_expert),
        e4m3=bool(method.rounds_weights),  # Hopper's with FP8 is the one that does
        stored=way.backend == "emulation",
    )


def _number(value: float) -> float | None:
    """None for NaN and infinity, which JSON has not."""
    return value if value - value == 0 else None
