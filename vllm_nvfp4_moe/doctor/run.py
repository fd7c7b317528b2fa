"""The order of things: what could run, how fast the device is, then each kernel by itself; and what
follows from it all."""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from vllm_nvfp4_moe.doctor import machine, rates
from vllm_nvfp4_moe.doctor.cases import QUICK_TOKENS, TOKENS
from vllm_nvfp4_moe.doctor.children import How, Started
from vllm_nvfp4_moe.doctor.compiling import ASKED, compiled, listener, preparing
from vllm_nvfp4_moe.doctor.kernels import VARIANTS, survey, ways
from vllm_nvfp4_moe.doctor.layer import one_rank
from vllm_nvfp4_moe.doctor.reference_files import prepare
from vllm_nvfp4_moe.doctor.shape import Shape, floor
from vllm_nvfp4_moe.doctor.verdict import verdict
from vllm_nvfp4_moe.doctor.work import Job, examine_when_told

FORMAT = 1
"""Of the result; docs/evidence/hardware/schema.json describes it."""

SECONDS, QUICK_SECONDS = 520.0, 37.0
"""That all may take after vLLM is imported, compiling aside; what does not fit is left out, and the
result says so."""
_HANGS = 90.0
"""Seconds beyond its share after which a kernel's process hangs, and is killed."""
_SURVEY, _FIGURES = 400.0, 360.0
"""Seconds: the first compiles Hopper kernels."""
_AHEAD = {"cuda": True, "cpu": False}
"""Whether a process makes ready while another works, by device: a CPU is busy with that one."""
_CHOSEN_COSTS = 3.0
"""How much more time kernels get that would be chosen."""
_CPU_WEIGHTS = {False: 0.95e9, True: 0.35e9}
"""That a layer has on a CPU at most, by whether it is quick: 16 and 6 experts of MiniMax-M3."""
_BYTES_A_WEIGHT = 4.0
"""On a GPU, while a layer is converted and its reference is computed: NVFP4 three times, and what
the emulation expands."""


def run(shape: Shape, tp: int | None, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    """Examine this machine with layers of ``shape``.

    Args:
        shape: on one rank.
        tp: how many ranks the slice is for; None for the most that divide the layer, 8 at most.
        say: is told what is being done.

    Returns:
        the result, as JSON has it.
    """
    begin = time.monotonic()
    # Whatever vLLM's import has made stays: looking through it took each process a second for each
    # layer, and this one's end three.
    gc.freeze()
    about = machine.about() | {"quick": quick, "unseen": machine.unseen()}
    device = torch.device("cuda", 0) if about["gpus"] else torch.device("cpu")
    shapes = {"whole": shape}
    tp = tp or next((n for n in (8, 4, 2) if shape.divides(n)), 1)
    if tp > 1:
        shapes["slice"] = shape.slice(tp)
    tokens = QUICK_TOKENS if quick else TOKENS
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        of_figures = (_figures, folder, shapes, tokens, quick, device)
        figuring = None
        if _AHEAD[device.type]:
            figuring = Started(*of_figures)
            stack.callback(figuring.end)
        say("which kernels could run here")
        asking = listener(say, "this package's kernels")
        surveyed = Started(_survey, shapes, device).finish(_SURVEY, asking)
        if surveyed.problem and device.type == "cuda":
            if figuring:
                figuring.end()
            How.name, figuring = "spawn", None
            surveyed = Started(_survey, shapes, device).finish(_SURVEY, asking)
        end = begin + (QUICK_SECONDS if quick else SECONDS) + compiled(surveyed.records)
        found = {(r["place"], r["variant"]): r for r in surveyed.records if r["what"] == "survey"}
        say("how fast the memory and the processor are; plain arithmetic, to compare with")
        measured = (figuring or Started(*of_figures)).finish(_FIGURES)
        figures: dict[str, Any] = next((r for r in measured.records if r["what"] == "rates"), {})
        figures.pop("what", None)
        ran = _ran(shapes, device, figures.get("free_bytes", 0), quick)
        result: dict[str, Any] = {
            "format": FORMAT,
            "about": about,
            "rates": figures,
            "problems": [p for p in (surveyed.problem, measured.problem) if p],
            "layers": [
                _layer(place, shapes[place], ran[place], variant, record)
                for (place, variant), record in found.items()
            ],
        }
        _kernels(result, ran, device, tokens, end, folder, say)
    for layer in result["layers"]:
        _floors(layer, ran[layer["place"]], figures)
    result["verdict"] = verdict(result)
    result["seconds"] = round(time.monotonic() - begin, 1)
    return result


def _kernels(
    result: dict[str, Any],
    ran: dict[str, Shape],
    device: torch.device,
    tokens: tuple[int, ...],
    end: float,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Run each kernel that could run, and put what was found into ``result``."""
    every = ways()
    where: dict[str, list[dict[str, Any]]] = {}
    for layer in result["layers"]:
        for kernel in layer["kernels"]:
            if kernel["reason"] is None:
                where.setdefault(kernel["name"], []).append(layer)
    # What is chosen first, should the time run out.
    chosen = [name for name in where if any(name in (w["chosen"], w["stock"]) for w in where[name])]
    order = [*chosen, *(name for name in where if name not in chosen)]
    with ExitStack() as stack:

        def start(name: str) -> Started:
            shape = ran[where[name][0]["place"]]
            begun = Started(examine_when_told, every[name], shape, device, folder, waits=True)
            stack.callback(begun.end)
            return begun

        begun = None
        for number, name in enumerate(order):
            say(f"{name} ({number + 1} of {len(order)})")
            costs = [_CHOSEN_COSTS if each in chosen else 1.0 for each in order[number:]]
            share = max(1.0, (end - time.monotonic()) * costs[0] / sum(costs))
            deadline = time.monotonic() + share
            waiting = [(layer["place"], layer["variant"]) for layer in where[name]]
            current, begun = begun or start(name), None
            while waiting:
                runnable = tuple(waiting)
                job = Job(name, every[name], ran, runnable, tokens, device, deadline, folder)
                current.tell(job)
                if begun is None and _AHEAD[device.type] and number + 1 < len(order):
                    begun = start(order[number + 1])
                left = max(1.0, deadline - time.monotonic()) + _HANGS
                ended = current.finish(left, listener(say, name))
                compiling = compiled(ended.records)
                deadline, end = deadline + compiling, end + compiling
                records = [r for r in ended.records if "place" in r]
                # Where it has died, or before the first: the others are tried without that one.
                at = [(r["place"], r["variant"]) for r in records]
                last = at[-1] if at else waiting[0]
                tried = waiting[: waiting.index(last) + 1] if ended.problem else waiting
                for layer in where[name]:
                    here = (layer["place"], layer["variant"])
                    if here in tried:
                        (kernel,) = (each for each in layer["kernels"] if each["name"] == name)
                        mine = [r for r, there in zip(records, at, strict=True) if there == here]
                        _gather(kernel, mine, ended.problem if here == last else None)
                waiting = waiting[len(tried) :]
                if waiting:
                    current = start(name)


def _gather(kernel: dict[str, Any], mine: list[dict[str, Any]], problem: str | None) -> None:
    """What a process has found of one kernel in one layer, and how it died there."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in mine:
        kept = {k: v for k, v in record.items() if k not in ("what", "place", "variant")}
        by_kind.setdefault(record["what"], []).append(kept)
    kernel |= next(iter(by_kind.get("built", [])), {})
    checks, compared = by_kind.get("checked", []), by_kind.get("compared", [])
    kernel["checks"], kernel["timed"] = checks, by_kind.get("timed", [])
    kernel["left_out"] = by_kind.get("left out", [])
    kernel["same_as"] = next((r["as_variant"] for r in by_kind.get("same", [])), None)
    found = [record["fault"] for record in (*checks, *compared) if record["fault"]]
    kernel["faults"] = list(dict.fromkeys(found))
    failed = [record["message"] for record in by_kind.get("failed", [])]
    kernel["message"] = "; ".join([*failed, *([problem] if problem else [])]) or None
    if not all(record["right"] for record in (*checks, *compared)):
        kernel["status"] = "wrong"
    elif kernel["message"]:
        kernel["status"] = "failed"
    else:
        kernel["status"] = "right" if checks else "no time"


def _layer(
    place: str, shape: Shape, ran: Shape, variant: str, record: dict[str, Any]
) -> dict[str, Any]:
    kernels = [
        {"name": name, "reason": reason, "status": "cannot run" if reason else "no time"}
        for name, reason in record["kernels"].items()
    ]
    return {
        "place": place,
        "variant": variant,
        "shape": asdict(shape),
        "experts_run": ran.experts,
        "chosen": record["chosen"],
        "stock": record["stock"],
        "problem": record.get("problem"),
        "kernels": kernels,
    }


def _floors(layer: dict[str, Any], ran: Shape, figures: dict[str, Any]) -> None:
    """Beside each time, the least that is possible by this device's rates."""
    for kernel in layer["kernels"]:
        # NVIDIA's tensor cores multiply 8 bits twice and 4 bits four times as fast as bfloat16.
        times = 16 / kernel.get("activation_bits", 16)
        for row in kernel.get("timed", ()):
            if "read_tb_s" in figures:
                least = floor(ran, row["tokens"], row["active"], figures["read_tb_s"],
                              figures["tflops"] * times)  # fmt: skip
                row["floor"] = {"ms": least.ms, "bound": least.bound}


def _ran(
    shapes: dict[str, Shape], device: torch.device, free: int, quick: bool
) -> dict[str, Shape]:
    """The layers that are run: with as many of the experts as this device can hold and, if it is a
    CPU, compute with in the time; at least those of one token."""
    shape = shapes["whole"]
    if device.type == "cpu":
        most = int(_CPU_WEIGHTS[quick] / shape.weights)
    else:
        most = int(0.8 * free / (_BYTES_A_WEIGHT * shape.weights))
    experts = min(shape.experts, max(most, shape.top_k))
    return {place: replace(each, experts=experts) for place, each in shapes.items()}


def _survey(shapes: dict[str, Shape], device: torch.device, emit: Callable[[Any], None]) -> None:
    with preparing(ASKED, emit), one_rank(device):
        for place, shape in shapes.items():
            for variant in VARIANTS:
                emit({"what": "begins", "at": f"asking for kernels, {place}, {variant}"})
                found = survey(shape, variant, device)
                emit({"what": "survey", "place": place, "variant": variant, **found})


def _figures(
    folder: Path,
    shapes: dict[str, Shape],
    tokens: tuple[int, ...],
    quick: bool,
    device: torch.device,
    emit: Callable[[Any], None],
) -> None:
    """How fast the device is, then plain arithmetic's outputs, in one process."""
    emit({"what": "begins", "at": "measuring the memory and the processor"})
    if device.type == "cuda":
        torch.cuda.set_device(device)
        free, total = torch.cuda.mem_get_info()
    else:
        free = total = _available()
    emit({"what": "rates", "free_bytes": free, "total_bytes": total, **rates.measure(device, free)})
    emit({"what": "begins", "at": "plain arithmetic"})
    prepare(folder, _ran(shapes, device, free, quick), tokens, device)


def _available() -> int:
    """Bytes of the machine's memory that can be had."""
    with suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4 << 30
