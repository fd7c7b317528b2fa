"""The jobs that make a plan's output, in the order of the source, and the shards they are in."""

from __future__ import annotations

from collections.abc import Iterator

from quantize.checkpoint.kv_cache import kv_cache_of
from quantize.checkpoint.reader import Checkpoint
from quantize.checkpoint.tensors import TensorInfo
from quantize.errors import QuantizeError
from quantize.experts.gates import Gates
from quantize.experts.group import ExpertGroup, tensor_names_of
from quantize.layouts.layout import Layout
from quantize.run.base_job import RoundBase, RoundExpert
from quantize.run.convert import ConvertExpert, ConvertLinear, is_converted
from quantize.run.jobs import Biases, Copy, Job, QuantizeExpert, QuantizeLinears
from quantize.run.kv_carried import carried_of
from quantize.run.kv_scales import KvScales, attentions
from quantize.run.options import Options


def jobs_of(
    checkpoint: Checkpoint,
    groups: list[ExpertGroup],
    dense: list[tuple[str, ...]],
    base: list[str],
    gates: Gates,
    layout: Layout,
    options: Options,
    eight_bit: list[ExpertGroup],
) -> Iterator[Job]:
    """Yield all jobs in the order of the source's files and tensors: reading stays sequential."""
    rule = options.scales
    rounded = set(base)
    caches = {}
    if options.kv_cache and options.kv_scales:
        caches = {
            f"{a}.v_proj.weight": a for a in attentions(checkpoint.tensors, checkpoint.config)
        }
    carried = carried_of(checkpoint, layout.name) if options.kv_carried else {}
    first = {group.tensor_names[0]: group for group in (*groups, *eight_bit)}
    formats = dict(options.formats)
    sets = {names[0]: names for names in dense}
    done = tensor_names_of([*groups, *eight_bit]) | {name for names in dense for name in names}
    done |= kv_cache_of(checkpoint.folder, checkpoint.config, checkpoint.stored).names
    for name, info in checkpoint.tensors.items():
        if name in first:
            group = first[name]
            interleaved = gates.of(group.prefix).interleaved
            own = layout.weights_only if options.keeps_floats(group.prefix) else layout
            for expert in range(group.num_experts):
                for job in expert_jobs(checkpoint, group, expert, interleaved, own, rule):
                    if group.prefix in formats and isinstance(job, QuantizeExpert):
                        yield RoundExpert(job, formats[group.prefix])
                    else:
                        yield job
        elif name in sets and checkpoint.is_nvfp4(name):
            rows, columns = info.shape
            nbytes = checkpoint.stored_bytes(name)
            yield ConvertLinear(sets[name], ((rows, columns),), layout, rule, nbytes, False)
        elif name in sets:
            shapes = tuple(checkpoint.tensors[n].shape for n in sets[name])
            yield QuantizeLinears(
                sets[name],
                tuple((rows, columns) for rows, columns in shapes),
                layout,
                rule,
                sum(checkpoint.stored_bytes(n) for n in sets[name]),
                any(len(checkpoint.parts(n)) > 1 for n in sets[name]),
            )
        elif name in rounded:
            assert options.base is not None
            rows, columns = info.shape
            size = checkpoint.stored_bytes(name)
            yield RoundBase(name, (rows, columns), options.base, layout.name, size)
        elif name in carried:
            yield carried[name]
        elif name not in done:
            decoded = checkpoint.parts(name) != (name,)
            output = TensorInfo(name, info.dtype, info.shape)
            yield Copy(output, checkpoint.stored_bytes(name), decoded)
        if name in caches:
            yield KvScales(caches[name], layout.name)


def expert_jobs(
    checkpoint: Checkpoint,
    group: ExpertGroup,
    expert: int,
    interleaved: bool,
    layout: Layout,
    rule: str,
) -> Iterator[QuantizeExpert | Biases]:
    """What makes one expert: its gate and up, its down, its biases if it has any."""
    share = group.num_experts if group.fused else 1
    weights = group.weights_of(expert)
    for gate_up, read in ((True, weights[:-1]), (False, weights[-1:])):
        job = ConvertExpert if is_converted(checkpoint, group, read) else QuantizeExpert
        yield job(
            group,
            expert,
            gate_up,
            interleaved,
            layout,
            rule,
            nbytes=sum(checkpoint.stored_bytes(name) for name in read) // share,
            decoded=any(checkpoint.parts(name) != (name,) for name in read),
        )
    if group.bias_names:
        sizes = [group.intermediate] * (len(group.projections) - 1) + [group.hidden]
        names = group.tensors_of(expert)[len(group.weights_of(expert)) :]
        dtypes = [checkpoint.tensors[name].dtype for name in names]
        dtypes = dtypes[:1] * group.joined + dtypes
        outputs = tuple(
            TensorInfo(f"{module}.bias", dtype, (size,))
            for module, dtype, size in zip(group.modules(expert), dtypes, sizes, strict=True)
        )
        yield Biases(group, expert, interleaved, outputs, sum(out.nbytes for out in outputs))


def check_unique(shards: list[list[Job]]) -> None:
    """Names such as ``experts.0`` and ``experts.00`` are one expert's.

    Raises:
        QuantizeError: if two jobs would write a tensor of the same name.
    """
    seen: set[str] = set()
    for out in (out for jobs in shards for job in jobs for out in job.outputs):
        if out.name in seen:
            raise QuantizeError(f"two tensors of the source would both be written as {out.name}")
        seen.add(out.name)


def into_shards(jobs: Iterator[Job], max_size: int) -> list[list[Job]]:
    """The jobs of each shard, in their order; ``max_size`` is in bytes of output."""
    shards: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        if shards[-1] and size + job.written > max_size:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += job.written
    return shards
