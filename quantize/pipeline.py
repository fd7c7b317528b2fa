"""Checkpoint in, NVFP4 checkpoint out: a list of small jobs over a stream of shards.

The whole output is planned from the source's headers: which tensors, in which shards, at which
offsets. Then one job at a time reads, quantizes and writes, so that memory holds one expert's
weights whatever the model's size. ``config.json`` comes last: until it is there, no engine takes
the folder for a checkpoint.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from quantize.checkpoint import INDEX, Checkpoint
from quantize.errors import QuantizeError
from quantize.experts import ExpertGroup, find, source_names
from quantize.gates import KEY, Gate, to_contract
from quantize.identify import identify
from quantize.layouts import LAYOUTS, Layout
from quantize.nvfp4 import BLOCK, NvFp4
from quantize.scales import quantize_weights
from quantize.shards import DTYPES, Output, ShardWriter, write_json

INPUT_SCALE = 1.0
"""Scale of the experts' inputs until they are calibrated."""

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
_REWRITTEN = {"config.json", "hf_quant_config.json", INDEX}

Progress = Callable[[int], None]
"""Told how many bytes of the source have just been done."""


class Job(NamedTuple):
    """A step that makes ``outputs`` from ``nbytes`` of the source when ``run`` is called."""

    outputs: tuple[Output, ...]
    nbytes: int
    run: Callable[[], list[torch.Tensor]]


@dataclass(frozen=True)
class Plan:
    """Everything about a run that is known before it."""

    groups: list[ExpertGroup]
    gate: Gate
    layout: Layout
    ignore: list[str]
    shards: list[list[Job]]

    @property
    def nbytes(self) -> int:
        """Bytes of tensors in the output."""
        return sum(out.nbytes for jobs in self.shards for job in jobs for out in job.outputs)


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    seconds: float
    bytes_before: int
    bytes_after: int
    shards: int


def plan(
    checkpoint: Checkpoint,
    layout: str = "modelopt",
    scales: str = "max",
    max_shard_size: int = 5 * 10**9,
    gate: Gate | None = None,
) -> Plan:
    """Plan the quantization of ``checkpoint``; reads headers only.

    Args:
        layout: a key of ``quantize.layouts.LAYOUTS``.
        scales: a key of ``quantize.scales.RULES``.
        max_shard_size: bytes; a shard exceeds it only if a single expert does.
        gate: the experts' gate, if the user states it; else it is identified.

    Raises:
        QuantizeError: see ``quantize.experts.find`` and ``quantize.identify.identify``; also for a
            source that is quantized already.
    """
    quantization = checkpoint.config.get("quantization_config")
    if quantization is not None:
        method = (
            quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        )
        raise QuantizeError(
            f"{checkpoint.folder / 'config.json'}: it is already quantized ({method}); "
            "start from the original one"
        )
    groups = find(checkpoint)
    gate = gate or identify(checkpoint.folder)
    chosen = LAYOUTS[layout]
    experts = source_names(groups)
    ignore = sorted(
        name.removesuffix(".weight")
        for name, info in checkpoint.tensors.items()
        if name not in experts and name.endswith(".weight") and len(info.shape) >= 2
    )
    jobs = list(_jobs(checkpoint, groups, gate, chosen, scales))
    return Plan(groups, gate, chosen, ignore, _into_shards(jobs, max_shard_size))


def execute(
    checkpoint: Checkpoint, plan: Plan, target: Path, overwrite: bool, progress: Progress
) -> Summary:
    """Carry out ``plan`` into the folder ``target``.

    Raises:
        QuantizeError: if ``target`` is the source, or holds files and ``overwrite`` is not set; if
            a weight is NaN or infinite.
    """
    started = time.perf_counter()
    _prepare(checkpoint, target, overwrite)
    names = _shard_names(len(plan.shards))
    weight_map: dict[str, str] = {}
    for name, jobs in zip(names, plan.shards, strict=True):
        contents = [out for job in jobs for out in job.outputs]
        weight_map |= {out.name: name for out in contents}
        with ShardWriter(target / name, contents) as writer:
            for job in jobs:
                for out, tensor in zip(job.outputs, job.run(), strict=True):
                    writer.write(out.name, tensor)
                progress(job.nbytes)
    if len(names) > 1:
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        write_json(target / INDEX, index)
    for file in sorted(checkpoint.folder.iterdir()):
        weights = file.suffix in _WEIGHTS or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in _REWRITTEN:
            shutil.copyfile(file, target / file.name)  # follows the hub cache's symbolic links
    for name, value in plan.layout.extra_files(plan.ignore).items():
        write_json(target / name, value)
    config = checkpoint.config | {
        KEY: to_contract(plan.gate.concatenated()),
        "quantization_config": plan.layout.quantization_config(plan.ignore),
    }
    write_json(target / "config.json", config)
    return Summary(time.perf_counter() - started, checkpoint.nbytes, plan.nbytes, len(plan.shards))


def _jobs(
    checkpoint: Checkpoint, groups: list[ExpertGroup], gate: Gate, layout: Layout, scales: str
) -> Iterator[Job]:
    """In the source's order of files and tensors, so that reading stays sequential."""
    first = {group.sources[0]: group for group in groups}
    experts = source_names(groups)
    for name, info in checkpoint.tensors.items():
        if name in first:
            group = first[name]
            size = sum(checkpoint.tensors[n].nbytes for n in group.sources) // group.num_experts
            for expert in range(group.num_experts):
                yield from _expert_jobs(checkpoint, group, expert, size, gate, layout, scales)
        elif name not in experts:
            output = Output(name, info.dtype, info.shape)
            yield Job((output,), info.nbytes, lambda n=name: [checkpoint.load(n)])  # type: ignore[misc]


def _expert_jobs(
    checkpoint: Checkpoint,
    group: ExpertGroup,
    expert: int,
    size: int,
    gate: Gate,
    layout: Layout,
    scales: str,
) -> Iterator[Job]:
    wide = (group.intermediate, group.hidden)
    gate_name, up_name, down_name = group.modules(expert)

    def store(weights: list[torch.Tensor], modules: tuple[str, ...]) -> list[torch.Tensor]:
        results = quantize_weights(weights, scales)
        if not torch.isfinite(results[0].global_scale):
            raise QuantizeError(
                f"{' and '.join(modules)} ({', '.join(_origin(group, expert))}) hold NaN or "
                "infinite weights; the source is damaged"
            )
        return [tensor for result in results for tensor in layout.store(result, INPUT_SCALE)]

    yield Job(
        (*outputs(gate_name, wide, layout), *outputs(up_name, wide, layout)),
        size * 2 // 3,
        lambda: store(
            list(group.gate_up(checkpoint, expert, gate.interleaved)), (gate_name, up_name)
        ),
    )
    yield Job(
        outputs(down_name, wide[::-1], layout),
        size - size * 2 // 3,
        lambda: store([group.down(checkpoint, expert)], (down_name,)),
    )


def _origin(group: ExpertGroup, expert: int) -> tuple[str, ...]:
    return group.sources if group.fused else group.sources[3 * expert : 3 * expert + 3]


def outputs(module: str, shape: tuple[int, int], layout: Layout) -> tuple[Output, ...]:
    """The tensors that one quantized weight of ``shape`` ``[out, in]`` is written as."""
    return tuple(
        Output(f"{module}.{suffix}", dtype, dims)
        for suffix, (dtype, dims) in zip(layout.suffixes, _stored(shape, layout.name), strict=True)
    )


@cache
def _stored(shape: tuple[int, int], layout: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """dtype and shape of each tensor that a layout makes of a weight; alike for all experts."""
    rows, columns = shape
    example = LAYOUTS[layout].store(
        NvFp4(
            torch.empty(rows, columns // 2, dtype=torch.uint8, device="meta"),
            torch.empty(rows, columns // BLOCK, dtype=torch.float8_e4m3fn, device="meta"),
            torch.empty((), device="meta"),
        ),
        INPUT_SCALE,
    )
    return tuple((DTYPES[tensor.dtype], tuple(tensor.shape)) for tensor in example)


def _into_shards(jobs: list[Job], max_size: int) -> list[list[Job]]:
    shards: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        nbytes = sum(out.nbytes for out in job.outputs)
        if shards[-1] and size + nbytes > max_size:
            shards.append([])
            size = 0
        shards[-1].append(job)
        size += nbytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _prepare(checkpoint: Checkpoint, target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise QuantizeError(f"{target} is a file; the target must be a folder")
    if target.exists() and target.resolve() == checkpoint.folder.resolve():
        raise QuantizeError(f"{target} is the source; choose another folder")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise QuantizeError(
                f"{target} is not empty; pass --overwrite to replace its checkpoint"
            )
        # What makes the old checkpoint look whole goes first.
        first = (target / "config.json", target / INDEX)
        rest = (*target.glob("*.safetensors"), *target.glob(".*.partial"))
        for file in (*first, *rest, target / "hf_quant_config.json"):
            file.unlink(missing_ok=True)
    target.mkdir(parents=True, exist_ok=True)
