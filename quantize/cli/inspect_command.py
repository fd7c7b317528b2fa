"""``nvfp4-moe inspect``: what would be quantized, what stays, and what it would save."""

from __future__ import annotations

from rich.filesize import decimal

from quantize.checkpoint.hub import look_up
from quantize.cli.errors import reporting_errors
from quantize.cli.large_imports import large_imports
from quantize.cli.options import (
    KEPT,
    MODELOPT,
    BaseOption,
    ExcludeOption,
    GateOption,
    IncludeOption,
    JsonOption,
    KvCacheOption,
    LayoutOption,
    LinearsOption,
    Source,
    TrustOption,
    stated_base,
    stated_gate,
)
from quantize.cli.output import out, plain, print_json, table
from quantize.cli.signals import ending_at_once
from quantize.cli.source_options import RevisionOption
from quantize.run.options import Options


def inspect(
    source: Source,
    revision: RevisionOption = None,
    layout: LayoutOption = MODELOPT,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    all_linears: LinearsOption = False,
    base: BaseOption = KEPT,
    kv_cache: KvCacheOption = None,
    gate: GateOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what SRC's routed experts are, their gate, and what quantizing would save; of a model on
    the hub only headers are read."""
    with reporting_errors():
        options = Options(
            layout=layout.value,
            gate=stated_gate(gate),
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            linears=all_linears,
            base=stated_base(base, all_linears),
            kv_cache=kv_cache.value if kv_cache else None,
            trust_remote_code=trust_remote_code,
        )
        with ending_at_once():
            found = look_up(source, revision)
        with large_imports():
            from quantize import inspection
            from quantize.checkpoint.opened import opened
            from quantize.run.plan import plan

        with ending_at_once():
            there = opened(found, code=trust_remote_code)
        with there as checkpoint:
            steps = plan(checkpoint, options)
            if as_json:
                print_json(inspection.as_json(checkpoint, steps))
                return
            experts = table(
                f"Routed experts of {source}",
                *("experts", "layers", "per layer", "hidden", "intermediate", "now", "NVFP4"),
            )
            experts.caption = f"gate: {plain(steps.gates)}"
            for row in inspection.expert_rows(checkpoint, steps):
                experts.add_row(
                    plain(row.pattern),
                    *map(str, (row.layers, row.experts, row.hidden, row.intermediate)),
                    decimal(row.bytes_now),
                    decimal(row.bytes_after),
                )
            out.print(experts)
            stays = table("Stays as it is", "tensors", "count", "dtype", "bytes")
            for other in inspection.other_rows(checkpoint, steps):
                stays.add_row(
                    plain(other.pattern), str(other.count), other.dtype, decimal(other.nbytes)
                )
            out.print(stays)
            for note in steps.notes:
                out.print(plain(note), highlight=False, soft_wrap=True)
            if steps.dense:
                out.print(f"Linears quantized too: {sum(map(len, steps.dense))}")
            if steps.base:
                out.print(f"Linears in {steps.options.base}: {len(steps.base)}")
            out.print(f"Whole checkpoint: {decimal(checkpoint.nbytes)} -> {decimal(steps.nbytes)}")
