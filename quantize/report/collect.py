"""What a finished run tells its report: the weights' errors, put together by layer."""

from __future__ import annotations

import math
from importlib.metadata import version

from quantize.checkpoint.hub import revision_of
from quantize.checkpoint.identity import digest_of
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.group import ExpertGroup
from quantize.layouts.base import BASES
from quantize.layouts.base.base_format import stored_base
from quantize.layouts.layout import stored_tensors
from quantize.report.data import (
    BaseReport,
    BitsReport,
    CalibrationReport,
    ExpertStats,
    LayerReport,
    RunReport,
)
from quantize.run import done
from quantize.run.bits import Choice
from quantize.run.done import staged_of
from quantize.run.kv_scales import KvRanges
from quantize.run.options import MIN_TOKENS, Calibration
from quantize.run.plan import Plan
from quantize.run.record import Record
from quantize.run.sessions import Session
from quantize.run.staged import Staged
from quantize.run.version import PACKAGE, VERSIONS, package_version
from quantize.run.weight_error import WeightError


def collect(
    checkpoint: Checkpoint,
    plan: Plan,
    record: Record,
    digests: dict[str, str],
    sessions: list[Session],
) -> RunReport:
    """The report's contents; but for the sessions, the same for a run in one go and one that was
    resumed.

    Args:
        digests: SHA-256 of the files that people edit, by name.
    """
    assert record.identity is not None
    lost = done.errors(record, plan)
    settings = plan.options.calibration
    rounded = settings if settings and settings.method is not None else None
    choice = plan.choice
    ranges = settings if plan.options.activations else None
    staged = staged_of(record, plan) if rounded else None
    return RunReport(
        source=record.source,
        target=record.target.name,
        command=record.command,
        layout=plan.layout.name,
        scales=plan.options.scales,
        versions={
            PACKAGE: package_version(),
            **{name: version(name) for name in VERSIONS},
        },
        bytes_before=checkpoint.nbytes,
        bytes_after=plan.nbytes,
        layers=[_layer(checkpoint, plan, group, lost, staged) for group in plan.groups],
        dense=_dense(checkpoint, plan, lost) if plan.dense else None,
        calibration=_settings(rounded) if rounded else None,
        activations="nvfp4" if plan.options.activations else "bf16",
        input_scales=_settings(ranges) if ranges else None,
        base=_base(checkpoint, plan, lost) if plan.base else None,
        bits=_bits(checkpoint, plan, choice, lost) if choice else None,
        kv_cache=plan.options.kv_cache,
        kv_scales=_kv_scales(checkpoint, plan, record),
        converted=plan.converts,
        fingerprint=record.fingerprint,
        of_commit=record.of_commit,
        files=sorted(record.names),
        digests=digests,
        revision=revision_of(checkpoint.folder),
        source_digest=digest_of(record.identity),
        weight_only=list(plan.options.weight_only),
        sessions=sessions,
    )


def _kv_scales(checkpoint: Checkpoint, plan: Plan, record: Record) -> dict[str, list[float]]:
    """By attention, the numbers of its keys' scale and then of its values', as they are stored."""
    found = {a: list(KvRanges(record.calibration).scales(a)) for a in plan.caches}
    return found | {
        job.attention: [x for scale in job.scales(checkpoint) for x in scale.flatten().tolist()]
        for job in plan.carried_caches
    }


def _settings(used: Calibration) -> CalibrationReport:
    samples, length = used.num_samples, used.sequence_length
    method, every = used.method or "", used.every_expert
    rule, digest = used.input_scale_rule, used.digest
    return CalibrationReport(used.text, samples, length, method, every, MIN_TOKENS, rule, digest)


def _layer(
    checkpoint: Checkpoint,
    plan: Plan,
    group: ExpertGroup,
    lost: dict[str, WeightError],
    staged: Staged | None,
) -> LayerReport:
    experts = [
        [lost[module] for module in group.modules(expert)] for expert in range(group.num_experts)
    ]
    written = sum(
        out.nbytes
        for module, shape in zip(group.modules(0), group.shapes, strict=True)
        for out in stored_tensors(module, shape, plan.layout_of(group))
    )
    biases = sum(checkpoint.tensors[name].nbytes for name in group.bias_names)  # kept as they are
    return LayerReport(
        prefix=group.prefix,
        gate=str(plan.gates.of(group.prefix)),
        projections=("gate", "up", "down")[-len(group.projections) :],
        errors=[tuple(map(_relative, weights)) for weights in experts],
        scale_counts=_total([weight for weights in experts for weight in weights]),
        bytes_before=sum(checkpoint.stored_bytes(name) for name in group.tensor_names),
        bytes_after=written * group.num_experts + biases,
        calibration=_stats(staged, group) if staged else None,
    )


def _stats(staged: Staged, group: ExpertGroup) -> ExpertStats:
    found = staged.findings(group)
    before, after = (
        [[_rounded(error) for error in errors] for errors in experts]
        for experts in (found.before, found.after)
    )
    return ExpertStats(found.tokens, found.rules, before, after)


def _dense(checkpoint: Checkpoint, plan: Plan, lost: dict[str, WeightError]) -> LayerReport:
    names = [name for names in plan.dense for name in names]
    modules = [name.removesuffix(".weight") for name in names]
    written = 0
    for name, module in zip(names, modules, strict=True):
        rows, columns = checkpoint.tensors[name].shape
        written += sum(out.nbytes for out in stored_tensors(module, (rows, columns), plan.layout))
    return LayerReport(
        prefix="dense linears",
        gate="",
        projections=("weight",),
        errors=[(_relative(lost[module]),) for module in modules],
        scale_counts=_total([lost[module] for module in modules]),
        bytes_before=sum(checkpoint.stored_bytes(name) for name in names),
        bytes_after=written,
        names=tuple(modules),
    )


def _base(checkpoint: Checkpoint, plan: Plan, lost: dict[str, WeightError]) -> BaseReport:
    assert plan.options.base is not None
    base, modules = BASES[plan.options.base], [name.removesuffix(".weight") for name in plan.base]
    written = 0
    for name, module in zip(plan.base, modules, strict=True):
        rows, columns = checkpoint.tensors[name].shape
        written += sum(
            out.nbytes for out in stored_base(module, (rows, columns), base, plan.layout.name)
        )
    return BaseReport(
        base.name,
        modules,
        [_relative(lost[module]) for module in modules],
        sum(checkpoint.stored_bytes(name) for name in plan.base),
        written,
    )


def _bits(
    checkpoint: Checkpoint, plan: Plan, choice: Choice, lost: dict[str, WeightError]
) -> BitsReport:
    experts = []
    for group in plan.eight_bit:
        base = BASES[plan.format_of(group)]
        modules = [m for expert in range(group.num_experts) for m in group.modules(expert)]
        written = sum(
            out.nbytes
            for module, shape in zip(group.modules(0), group.shapes, strict=True)
            for out in stored_base(module, shape, base, plan.layout.name, expert=True)
        )
        experts.append(
            BaseReport(
                base.name,
                modules,
                [_relative(lost[module]) for module in modules],
                sum(checkpoint.stored_bytes(name) for name in group.tensor_names),
                written * group.num_experts,
            )
        )
    losses = {
        prefix: {name: _rounded(loss) for name, loss in of.items()}
        for prefix, of in choice.losses.items()
    }
    return BitsReport(choice.bits, _rounded(choice.taken), dict(choice.formats), losses, experts)


def _relative(weight: WeightError) -> float:
    return _rounded(math.sqrt(weight.noise / weight.signal)) if weight.signal else math.nan


def _rounded(error: float) -> float:
    """Round to six digits. Later ones depend on the order in which a device sums."""
    return float(f"{error:.6g}")


def _total(weights: list[WeightError]) -> list[int]:
    return [sum(column) for column in zip(*(w.counts for w in weights), strict=True)]
