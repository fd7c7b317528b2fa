"""``quantize --dry-run``: all that a run would do, with sizes and time. Nothing is written."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from quantize.cli.output import out, plain, table
from quantize.duration import duration, speed

if TYPE_CHECKING:
    from quantize.execute import Run
    from quantize.experts.group import ExpertGroup
    from quantize.run.plan import Plan
    from quantize.run.space import Space

DryOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Say all that would be done, with sizes, memory, disk and time, and write nothing, "
        "e.g. --calibrate texts.jsonl --dry-run. The exit code is the run's, if that would be "
        "refused.",
    ),
]


def show(run: Run, space: Space | None) -> None:
    """Show a run that is not carried out; see ``quantize.execute.Dry``."""
    out.quiet = False  # this was asked for
    if space is None:
        _say(f"{run.record.target} is complete already: nothing would be done.")
        return
    out.print(_experts(run.plan))
    for line in _beside_experts(run.plan):
        _say(line)
    _files(run)
    for line in (*_disk(run, space), *_time(run)):
        _say(line)
    _say("Dry run: nothing was written.")


def _say(line: str) -> None:
    out.print(plain(line), highlight=False, soft_wrap=True)


def _experts(plan: Plan) -> object:
    """Which layers' experts become what."""
    from quantize.experts.names import layer_number
    from quantize.run.bits import NVFP4

    shown = table(
        "Experts", "layers", "experts of each", "hidden", "intermediate", "gate", "become", "bytes"
    )
    rows: dict[tuple[str, ...], list[ExpertGroup]] = defaultdict(list)
    for group in (*plan.groups, *plan.eight_bit):
        becomes = plan.format_of(group) if group in plan.eight_bit else NVFP4
        if group not in plan.eight_bit and plan.options.keeps_floats(group.prefix):
            becomes = f"{becomes}, inputs bf16"
        sizes = group.num_experts, group.hidden, group.intermediate
        rows[(*map(str, sizes), str(plan.gates.of(group.prefix)), becomes)].append(group)
    written: dict[tuple[str, str], int] = defaultdict(int)
    for job in (job for jobs in plan.shards for job in jobs):
        for module in job.modules:
            prefix, expert, _ = f"..{module}".rsplit(".", 2)
            written[prefix.removeprefix(".."), expert] += job.written // len(job.modules)
    for (*figures, gate, becomes), groups in rows.items():
        numbers = [layer_number(group.prefix) for group in groups]
        layers = _ranges(sorted({n for n in numbers if n is not None}))
        nbytes = sum(
            written[group.prefix, str(group.first + expert)]
            for group in groups
            for expert in range(group.num_experts)
        )
        shown.add_row(layers or groups[0].prefix, *figures, plain(gate), becomes, decimal(nbytes))
    return shown


def _ranges(numbers: Sequence[int]) -> str:
    """``1, 3-5``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _beside_experts(plan: Plan) -> Iterator[str]:
    if plan.dense:
        yield f"Linears in NVFP4 too: {sum(map(len, plan.dense))}"
    if plan.base:
        yield f"Linears in {plan.options.base}: {len(plan.base)}"
    left = sum(group not in plan.groups + plan.eight_bit for group in plan.found)
    if left:
        yield f"Experts that stay as they are: those of {left} layers"


def _files(run: Run) -> None:
    """The files of the target."""
    from quantize.run.shards import header

    plan, record = run.plan, run.record
    shown = table(f"Files in {record.target}", "file", "tensors", "bytes", "is")
    for shard, name in enumerate(plan.file_names):
        outputs = plan.outputs(shard)
        size = len(header(outputs)) + sum(one.nbytes for one in outputs)
        what = "made" if shard in run.missing else "there already"
        shown.add_row(name, str(len(outputs)), decimal(size), what)
    for name in run.others:
        size = (run.checkpoint.folder / name).stat().st_size
        shown.add_row(plain(name), "", decimal(size), "copied")
    for name in record.names:
        if name not in {*plan.file_names, *run.others}:
            shown.add_row(plain(name), "", "", "made")
    out.print(shown)
    replaced = record.replaced
    for names, what in ((replaced.delete, "removed"), (replaced.aside, f"in {replaced.folder}/")):
        for name in names:
            _say(f"{record.target / name}: would be {what}")


def _disk(run: Run, space: Space) -> Iterator[str]:
    from quantize.checkpoint.opened import to_bring
    from quantize.run.space import free

    target, work = run.record.target, run.record.calibration
    yield f"Disk: {decimal(space.shards)} to be written in {target} ({decimal(free(target))} free)"
    if space.source:
        yield f"Disk: {decimal(space.source)} of SRC's files beside them, at most"
    if downloads := to_bring(run.checkpoint):
        yield f"Disk: {decimal(downloads)} to be downloaded into {run.checkpoint.folder}"
    if space.calibration:
        yield (
            f"Disk: {decimal(space.calibration)} of hidden states in {work} ("
            f"{decimal(free(work))} free), until the run is complete"
        )


def _time(run: Run) -> Iterator[str]:
    """Memory, and how long it takes."""
    from quantize.run.jobs import QuantizeExpert
    from quantize.run.pace import pace

    plan = run.plan
    jobs = [job for shard in run.missing for job in plan.shards[shard]]
    # Calibration writes these itself, and its own estimate has them.
    jobs = [job for job in jobs if not (plan.rounds and isinstance(job, QuantizeExpert))]
    seconds = run.estimate.seconds if run.estimate else 0.0
    if jobs and not run.checkpoint.weights.here:
        nbytes = run.checkpoint.nbytes
        also = f" beside the {duration(seconds)} of calibration" if seconds else ""
        what = f"downloading {decimal(nbytes)} and making them into files"
        yield f"Time: of {what}, nothing is known{also}"
    elif jobs and run.ray is None:
        found = pace(run.checkpoint, jobs, run.devices, run.threads)
        nbytes = sum(job.nbytes for job in jobs)
        seconds += nbytes / found.speed
        yield (
            f"Memory: {decimal(found.memory)} for {found.threads} threads that write the files, "
            "beside what Python and PyTorch take"
        )
        yield (
            f"Time: about {duration(seconds)}; {decimal(nbytes)} are read and made into files at "
            f"{speed(found.speed)} (measured), if the disk takes as much"
        )
    elif jobs:
        also = f" beside the {duration(seconds)} of calibration" if seconds else ""
        yield f"Time: of writing the files on the Ray cluster, nothing is known{also}"
    elif seconds:
        yield f"Time: about {duration(seconds)}"
