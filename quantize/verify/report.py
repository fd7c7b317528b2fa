"""The run's report beside the checkpoint: gates, sizes, names, files, and what was edited since.

Its errors and counts of block scales are compared where these are found (``claims``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from quantize.checkpoint.json_files import INDEX
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.gates import Gate, Gates
from quantize.experts.names import is_expert
from quantize.layouts import config_files
from quantize.layouts.base.base_format import CODES, BaseFormat, stored_base
from quantize.layouts.layout import Layout, stored_nbytes
from quantize.report.data import LayerReport, RunReport
from quantize.run.report_files import REPORT, REPORT_DATA
from quantize.verify.base import base_modules
from quantize.verify.claims import BASE, CONFIG, DENSE, Claims
from quantize.verify.weights import Weights


def report_problems(
    target: Checkpoint,
    layout: Layout,
    claims: Claims,
    weights: Sequence[Weights],
    gates: Gates | None,
    before: Mapping[str, int],
    total_before: int | None,
    whole: bool,
) -> Iterator[str]:
    """Where the report says otherwise than the checkpoint's tensors and files.

    Args:
        weights: all that is quantized.
        gates: the experts'; None if they are not known.
        before: bytes in the source, by the prefix of a layer; empty without a source.
        total_before: of the whole source; None without one.
        whole: nothing else is wrong, so that sizes must agree.
    """
    if claims.made is None or claims.run is None:
        return
    run = claims.run
    said: dict[str, list[LayerReport]] = {}
    for layer in (*run.layers, *([run.dense] if run.dense else ())):
        said.setdefault(layer.prefix, []).append(layer)
    found: dict[str, list[Weights]] = {}
    for one in weights:
        found.setdefault(one.prefix, []).append(one)
    alone = total_before is None
    if claims.foreign:  # the source is not the one that the report is of
        total_before, before = None, {}
    totals = {"bytes_before": (run.bytes_before, total_before)}
    totals["bytes_after"] = (run.bytes_after, target.nbytes)
    for name, (theirs, ours) in totals.items():
        if whole and ours is not None and theirs != ours:
            yield f"{REPORT_DATA}: {name} is {theirs}, but it is {ours}; quantize again"
    if alone and claims.made.converted:
        # What was NVFP4 in the source is under the dense linears, drafting layers' experts too.
        # Names alone do not tell which of them were.
        known = said.keys() & found.keys() - {DENSE}
        said = {prefix: said[prefix] for prefix in known}
        found = {prefix: found[prefix] for prefix in known}
    for prefix in said.keys() - found.keys():
        yield f"{REPORT_DATA} has {prefix}, which is not quantized; quantize again"
    for prefix in found.keys() - said.keys() if alone else ():
        yield f"{REPORT_DATA} does not have {prefix}; quantize again"
    for prefix in found.keys() & said.keys():
        yield from _layer_problems(
            target, prefix, said[prefix], found[prefix], layout, gates, before.get(prefix)
        )
    yield from _base_problems(target, run, layout, before)
    yield from _file_list_problems(target, claims)


def _base_problems(
    target: Checkpoint, run: RunReport, layout: Layout, before: Mapping[str, int]
) -> Iterator[str]:
    """Likewise, of what is in 8 bits: linears, and each layer's experts."""
    found: dict[str, dict[str, BaseFormat]] = {}
    for module, base in base_modules(target).items():
        key = module.rsplit(".", 2)[0] if is_expert(module) else BASE
        found.setdefault(key, {})[module] = base
    said = {BASE: run.base} if run.base else {}
    said |= {one.names[0].rsplit(".", 2)[0]: one for one in run.bits.experts} if run.bits else {}
    for key in sorted(found.keys() | said.keys()):
        of, what = said.get(key), "base" if key == BASE else f"bits: {key}"
        modules = found.get(key, {})
        if sorted(of.names if of else ()) != sorted(modules):
            yield f"{REPORT_DATA}: {what} names other weights than are in 8 bits; quantize again"
        elif of is not None:
            after = 0
            for module, base in modules.items():
                rows, columns = target.tensors[f"{module}.{CODES}"].shape
                stored = stored_base(module, (rows, columns), base, layout.name, key != BASE)
                after += sum(out.nbytes for out in stored)
            for name, ours, theirs in (
                ("bytes_before", before.get(key), of.bytes_before),
                ("bytes_after", after, of.bytes_after),
                ("errors", len(modules), len(of.errors)),
                ("format", {base.name for base in modules.values()}, {of.format}),
            ):
                if ours is not None and ours != theirs:
                    yield (
                        f"{REPORT_DATA}: {what}: {name} is {theirs}, but it is {ours}; quantize "
                        "again"
                    )


def edited(target: Checkpoint, claims: Claims, problems: Sequence[str]) -> Iterator[str]:
    """Files that were edited since the run wrote them, and in which no other problem is known."""
    for name, digest in claims.run.digests.items() if claims.made and claims.run else ():
        file = target.folder / name
        if file.is_file() and not any(str(file) in problem for problem in problems):
            with file.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() != digest:
                    yield f"{file} was changed since it was written; quantize again"


def _layer_problems(
    target: Checkpoint,
    prefix: str,
    said: list[LayerReport],
    weights: list[Weights],
    layout: Layout,
    gates: Gates | None,
    before: int | None,
) -> Iterator[str]:
    dense = prefix == DENSE
    modules = sorted(module for one in weights for module in one.modules)
    kinds = {module.rpartition(".")[2] for module in modules}
    after = sum(stored_nbytes(shape, one.layout(layout)) for one in weights for shape in one.shapes)
    if not dense:
        biases = (target.tensors.get(f"{module}.bias") for module in modules)
        after += sum(bias.nbytes for bias in biases if bias)
    projections = ("weight",) if dense else ("gate", "up", "down")[-len(kinds) :]
    wanted = {
        "projections": {projections},
        "gate": {""} if dense else _alike(gates.of(prefix)) if gates else None,
    }
    for layer in said:
        for name, allowed in wanted.items():
            value = getattr(layer, name)
            if allowed is not None and value not in allowed:
                yield (
                    f"{REPORT_DATA}: {prefix}: {name} is {value!r}, but it is {min(allowed)!r}; "
                    "quantize again"
                )
    names = sorted(name for layer in said for name in layer.names)
    if names != (modules if dense else []):
        yield f"{REPORT_DATA}: {prefix}: names is not what is quantized; quantize again"
    sizes = {"bytes_before": before, "bytes_after": after}
    for name, size in sizes.items():
        total = sum(getattr(layer, name) for layer in said)
        if size is not None and total != size:
            yield f"{REPORT_DATA}: {prefix}: {name} is {total}, but it is {size}; quantize again"


def _alike(gate: Gate) -> set[str]:
    """How a report may call a gate: the source's order of gate and up is not the checkpoint's."""
    orders = (False, True) if gate.gated else (False,)
    return {str(replace(gate, interleaved=interleaved)) for interleaved in orders}


def _file_list_problems(target: Checkpoint, claims: Claims) -> Iterator[str]:
    assert claims.run is not None
    wanted = {file.name for file in target.files} | claims.run.digests.keys()
    wanted |= {CONFIG, REPORT, REPORT_DATA}
    wanted |= {name for name in (INDEX, *config_files()) if (target.folder / name).is_file()}
    said = claims.run.files
    for name in sorted(wanted - set(said)):
        yield f"{REPORT_DATA}: files and digests differ, or lack {name}; quantize again"
        return
    for name in said:
        if name not in wanted and (target.folder / name).is_file():
            yield f"{REPORT_DATA}: files has {name}, which no run writes; quantize again"
    if sorted(set(said)) != said:
        yield f"{REPORT_DATA}: files is not in order; quantize again"
