"""The result as text, to be read and to be pasted: one table, and below it what it cannot show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from vllm_nvfp4_moe.doctor.shape import restored, title

_SHOWN = (1, 8, 64, 256, 1024, 8192)
"""Numbers of tokens with a column, if they were timed."""
_LOUD = ("wrong", "failed")
_TEXT_COLUMNS = 3
_LEGEND = (
    "Milliseconds of one layer's experts, by number of tokens. error: the worst token's, relative "
    "to plain float32 arithmetic, which rounds activations to 8 and 4 bits where the kernel does. "
    "* this package's choice, + vLLM's own."
)


def text(result: Mapping[str, Any]) -> str:
    """Everything, in lines."""
    parts = [_head(result), _layers(result), _table(result), _LEGEND, _cannot(result)]
    parts += [_notes(result), _verdict(result["verdict"])]
    return "\n\n".join(part for part in parts if part)


def _head(result: Mapping[str, Any]) -> str:
    about, rates = result["about"], result["rates"]
    packages = ", ".join(f"{n} {v}" for n, v in about["packages"].items() if v)
    gpus = f"{about['gpus']} of compute capability {about['capability']}, driver {about['driver']}"
    lines = [
        f"device: {about['device']}" + (f" ({gpus})" if about["gpus"] else ""),
        f"host: {about['cpu']}, {about['cores']} cores, {about['system']}",
        f"vLLM {about['vllm']}, vllm-nvfp4-moe {about['plugin']}, Python {about['python']}; "
        f"{packages}",
        "vLLM sees the plugin: " + (f"NO: {about['unseen']}" if about["unseen"] else "yes"),
    ]
    if "read_tb_s" in rates:
        lines.append(
            f"measured: memory is read at {1000 * rates['read_tb_s']:.0f} GB/s, matrices are "
            f"multiplied at {rates['tflops']:.3g} TFLOP/s"
        )
    return "\n".join(lines)


def _where(layer: Mapping[str, Any]) -> str:
    return f"{layer['place']}, {layer['variant']}"


def _every(result: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Each layer with each of its kernels."""
    for layer in result["layers"]:
        for kernel in layer["kernels"]:
            yield layer, kernel


def _layers(result: Mapping[str, Any]) -> str:
    lines = {}
    for layer in result["layers"]:
        shape, ran = restored(layer["shape"]), layer["experts_run"]
        fewer = f"; RUN WITH {ran} EXPERTS of {shape.experts}, to fit this machine"
        told = "" if ran == shape.experts else fewer
        lines[layer["place"]] = f"{layer['place']}: {title(shape)}{told}"
    return "\n".join(lines.values())


def _table(result: Mapping[str, Any]) -> str:
    timed = {r["tokens"] for _, kernel in _every(result) for r in kernel.get("timed", ())}
    shown = [count for count in _SHOWN if count in timed]
    rows = [["layer", "kernel", "is", "error", *(f"{count} tok" for count in shown)]]
    for layer in result["layers"]:
        rows += _rows(layer, shown)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column < _TEXT_COLUMNS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, f"| {' | '.join('-' * width for width in widths)} |")
    return "\n".join(lines)


def _rows(layer: Mapping[str, Any], shown: list[int]) -> Iterator[list[str]]:
    """A row for each kernel that could run; and their floor."""
    floors: dict[int, float] = {}
    for kernel in layer["kernels"]:
        if kernel["reason"]:
            continue
        signs = (("*", "chosen"), ("+", "stock"))
        mark = "".join(sign for sign, key in signs if layer[key] == kernel["name"])
        rows = {row["tokens"]: row for row in kernel.get("timed", ())}
        for tokens, row in rows.items():
            if "floor" in row:
                floors[tokens] = min(row["floor"]["ms"], floors.get(tokens, math.inf))
        errors = [check["token_error"] for check in kernel.get("checks", ())]
        error = "NaN" if None in errors else f"{max(errors):.2g}" if errors else "-"
        status = kernel["status"]
        times = [_ms(rows[count]["ms"]) if count in rows else "-" for count in shown]
        loud = status.upper() if status in _LOUD else status
        yield [_where(layer), kernel["name"] + mark, loud, error, *times]
    if floors:
        least = [_ms(floors[count]) if count in floors else "-" for count in shown]
        yield [_where(layer), "(floor)", "", "", *least]


def _ms(value: float) -> str:
    return f"{value:.{4 if value < 0.1 else 3 if value < 10 else 1}f}"


def _cannot(result: Mapping[str, Any]) -> str:
    """Each kernel that cannot run, with its reason, once."""
    where: dict[tuple[str, str], list[str]] = {}
    for layer, kernel in _every(result):
        if kernel["reason"]:
            where.setdefault((kernel["name"], kernel["reason"]), []).append(_where(layer))
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (name, reason), places in where.items():
        alike.setdefault((reason, tuple(places)), []).append(name)
    lines = []
    for (reason, there), names in alike.items():
        told = "" if len(there) == len(result["layers"]) else f" ({'; '.join(there)})"
        lines.append(f"- {', '.join(names)}: {reason}{told}")
    return "\n".join(["Cannot run here:", *lines]) if lines else ""


def _notes(result: Mapping[str, Any]) -> str:
    lines = [f"- {note}" for note in result["notes"]]
    for layer, kernel in _every(result):
        name = f"{_where(layer)}, {kernel['name']}"
        if kernel.get("same_as"):
            lines.append(
                f"- {name}: the same kernel as in {kernel['same_as']}, tried again briefly"
            )
        if left := kernel.get("left_out"):
            cases = ", ".join(f"{row['tokens']} {row['routing']}" for row in left)
            lines.append(f"- {name}: left out for want of time: {cases}")
    return "\n".join(lines)


def _verdict(verdict: Mapping[str, Any]) -> str:
    lines = [f"WARNING {line}" for line in verdict["warnings"]]
    lines += [f"WRONG {line}" for line in verdict["problems"]]
    if not verdict["right"]:
        lines.append(
            "VERDICT: what would be chosen here is wrong. Choose another by --moe-backend, and "
            "please report this, with the file of --json"
        )
    elif verdict["warnings"]:  # such as that there was no time to try it
        lines.append("VERDICT: of what would be chosen here nothing was found wrong; see above")
    else:
        lines.append("VERDICT: what would be chosen here is right")
    return "\n".join(lines)
