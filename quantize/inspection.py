"""What ``nvfp4-moe inspect`` shows: what would be quantized, what stays, and what it would save."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from quantize.checkpoint.hub import revision_of
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.group import ExpertGroup, tensor_names_of
from quantize.run.jobs import Biases, QuantizeExpert
from quantize.run.plan import Plan


@dataclass(frozen=True)
class ExpertRow:
    """Layers whose experts are alike."""

    pattern: str
    layers: int
    experts: int
    hidden: int
    intermediate: int
    bytes_now: int
    bytes_after: int


@dataclass(frozen=True)
class OtherRow:
    """Tensors that stay, of one kind (names alike but for numbers)."""

    pattern: str
    count: int
    dtype: str
    nbytes: int


def expert_rows(checkpoint: Checkpoint, plan: Plan) -> list[ExpertRow]:
    """One row for each kind of MoE layer."""
    alike: dict[tuple[str, int, int, int], list[ExpertGroup]] = defaultdict(list)
    for group in plan.groups:
        key = (_pattern(group.prefix), group.num_experts, group.hidden, group.intermediate)
        alike[key].append(group)
    after: dict[tuple[str, int], int] = defaultdict(int)
    for job in (job for jobs in plan.shards for job in jobs):
        if isinstance(job, QuantizeExpert | Biases):
            after[job.group.prefix, job.group.first] += job.written
    return [
        ExpertRow(
            pattern,
            len(groups),
            experts,
            hidden,
            intermediate,
            sum(checkpoint.stored_bytes(name) for g in groups for name in g.tensor_names),
            sum(after[g.prefix, g.first] for g in groups),
        )
        for (pattern, experts, hidden, intermediate), groups in alike.items()
    ]


def other_rows(checkpoint: Checkpoint, plan: Plan) -> list[OtherRow]:
    """One row for each kind of tensor that stays as it is, largest first."""
    quantized = tensor_names_of(plan.groups + plan.eight_bit)
    quantized.update(plan.base, (name for names in plan.dense for name in names))
    kinds: dict[tuple[str, str], list[int]] = defaultdict(list)
    for name, info in checkpoint.tensors.items():
        if name not in quantized:
            kinds[_pattern(name), info.dtype].append(checkpoint.stored_bytes(name))
    rows = [OtherRow(name, len(n), dtype, sum(n)) for (name, dtype), n in kinds.items()]
    return sorted(rows, key=lambda row: -row.nbytes)


def as_json(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """Everything that the tables show, and each layer's gate, for programs; sizes in bytes."""
    gates = plan.gates
    return {
        "source": str(checkpoint.folder),
        "revision": revision_of(checkpoint.folder),
        "gate": gates.default.fields(),
        "layer_gates": {str(number): gate.fields() for number, gate in gates.layers.items()},
        "source_formats": sorted(checkpoint.formats),
        "layers": [group.prefix for group in plan.groups],
        "experts": [asdict(row) for row in expert_rows(checkpoint, plan)],
        "dense_linears": sum(map(len, plan.dense)),
        "base": plan.options.base,
        "base_linears": len(plan.base),
        "kv_cache": plan.options.kv_cache,
        "unchanged": [asdict(row) for row in other_rows(checkpoint, plan)],
        "notes": list(plan.notes),
        "bytes_before": checkpoint.nbytes,
        "bytes_after": plan.nbytes,
    }


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "N", name)
