"""One routed-experts layer: our Hopper kernels beside those of others, in one run.

    python -m benchmarks.moe_layer [--shapes minimax-m3] [--tp 1 2 4 8] [--out results.json]
    python -m benchmarks.moe_layer --device cpu --shapes minimax-m3-16 --tp 1 --bandwidth 0.02
    python -m benchmarks.moe_layer --table results.json    Markdown of saved runs, without a GPU

Every kernel runs in the layer that vLLM builds (FlashInfer's in FlashInfer's: ``PEERS``), from the
same random weights (bf16 gets them dequantized: global scales are powers of two, so that it loses
nothing). The router is outside: all get the same ``topk_weights`` and ``topk_ids``. A peer whose
packages are not there, or that cannot run a shape, is left out, and the run says why. With
``--shared-expert`` each is also timed beside one. Times are medians of replays of a CUDA graph, the
kernels' replays taking turns; a graph holds up to 8 routings, so that one's weights are not in L2
for the next. All layers of a shape are on the GPU at once, 55 GB at most.

The floor is the larger of: the active experts' weights at 4.5 bits over ``--bandwidth``, and the
multiplications and additions over ``--flops``. A tensor-parallel slice is one rank's GEMMs, without
communication. Before the timing, 32 tokens are compared with plain float32 arithmetic and between
the kernels; after it, what the graphs computed. Beyond 3 % (with FP8 activations 10 %) is WRONG:
exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.absent import AbsentError
from benchmarks.flashinfer_cutile import CuTile
from benchmarks.flashinfer_fp8 import FusedFp8
from benchmarks.moe_layer_table import (
    EIGHT_BITS,
    MORE,
    SHAPES,
    TITLES,
    beside_table,
    number,
    report,
    summary,
    table,
)
from benchmarks.shared_expert import Beside, SharedExpert
from vllm_nvfp4_moe.doctor.inputs import (
    Batch,
    Biases,
    Stored,
    apart,
    batch,
    batches,
    plain,
    random_biases,
    random_weights,
)
from vllm_nvfp4_moe.doctor.layer import Layer, Way, build, one_rank
from vllm_nvfp4_moe.doctor.shape import Shape, active_experts, title
from vllm_nvfp4_moe.doctor.timing import WARM, Pass, time_on_cpu, time_on_gpu

TOKENS = tuple(2**n for n in range(15))
APART, APART_FP8 = 0.03, 0.1
"""Relative error from which a kernel is wrong, and with FP8 activations."""
CHECKED = 32
"""Tokens that are compared before the timing."""
ROUNDS = 15
"""Timed replays of each graph."""
WAYS = {
    "cuda": {
        "ours": Way("auto", "HopperMethod", "HOPPER ("),
        "fp8": Way("auto", "HopperMethod", "HOPPER FP8 (", "fp8"),
        "humming": Way("humming", "VllmKernelsMethod", "HUMMING"),
        "marlin": Way("marlin", "VllmKernelsMethod", "MARLIN"),
        "bf16": Way("triton", "UnquantizedFusedMoEMethod", "TRITON"),
    },
    # Where this file only tries itself out.
    "cpu": {
        "ours": Way("auto", "CpuMethod", "the CPU kernel"),
        "bf16": Way("auto", "UnquantizedFusedMoEMethod", "CPU"),
    },
}
PEERS: dict[str, dict[str, Callable[..., Any]]] = {
    "cuda": {"cutile": CuTile, "flashinfer-fp8": FusedFp8},
    "cpu": {},
}
"""Layers that vLLM does not build. They take what :func:`build` takes, and raise AbsentError."""


def most(*kernels: str) -> float:
    """How far these may be apart."""
    return APART_FP8 if EIGHT_BITS.intersection(kernels) else APART


def made(
    name: str, shape: Shape, w13: Stored, w2: Stored, biases: Biases | None, device: str
) -> Any:
    """The layer that this kernel runs: called with a :class:`Batch`, its ``kernel`` is a name.

    Raises:
        AbsentError: if a peer cannot run here, or not this shape.
        WrongKernelError: if vLLM's layer runs another kernel.
    """
    if name in PEERS[device]:
        return PEERS[device][name](shape, w13, w2, biases)
    return build(shape, w13, w2, WAYS[device][name], biases)


class Clocks:
    """The GPU's clocks, in MHz, by ``nvidia-smi`` every 0.1 s while this is entered."""

    FIELDS = "timestamp,clocks.sm,clocks.mem"

    def __init__(self, device: torch.device) -> None:
        self.on = device.type == "cuda"
        self.samples: list[tuple[float, int, int]] = []
        self.busy: list[tuple[float, float]] = []

    @staticmethod
    def query(fields: str, *more: str) -> list[str]:
        number = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
        wanted = f"--query-gpu={fields}"
        return ["nvidia-smi", "-i", number, wanted, "--format=csv,noheader,nounits", *more]

    def __enter__(self) -> Clocks:
        if self.on:
            command = self.query(self.FIELDS, "-lms", "100")
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            self.reader = threading.Thread(target=self._read, daemon=True)
            self.reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # a header, or "[N/A]"
                when, sm, memory = (part.strip() for part in line.split(","))
                moment = datetime.datetime.strptime(when, "%Y/%m/%d %H:%M:%S.%f").timestamp()
                self.samples.append((moment, int(sm), int(memory)))

    def __exit__(self, *_: object) -> None:
        if self.on:
            self.process.terminate()
            self.process.wait()
            self.reader.join()

    def during(self) -> dict[str, list[int]]:
        """Least, median and most while kernels were timed, since it was last asked."""
        spans, self.busy = self.busy, []
        seen = [s for s in self.samples if any(begin <= s[0] <= end for begin, end in spans)]
        return {
            name: [min(values), int(statistics.median(values)), max(values)]
            for name, values in (("sm", [s[1] for s in seen]), ("mem", [s[2] for s in seen]))
            if values
        }


def timed(
    layers: Mapping[str, Any],
    given: Sequence[Batch],
    rounds: int,
    clocks: Clocks,
    uncompared: Mapping[str, Any] | None = None,
) -> tuple[dict[str, list[float]], dict[str, float], list[str]]:
    """Milliseconds a call of each, by turns; how far each is from the first; what went wrong.

    Args:
        uncompared: timed with the others, but something else.
    """
    problems: list[str] = []
    passes: dict[str, Pass] = {}
    apart_too = uncompared or {}

    def attempt(name: str, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # the others' figures must not be lost
            problems.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            passes.pop(name, None)
            return None

    on_gpu = given[0].x.is_cuda
    for name, layer in {**layers, **apart_too}.items():
        if (ready := attempt(name, partial(Pass, layer, given))) is not None:
            passes[name] = ready
    for name, each in list(passes.items()):
        attempt(name, each.capture)
    outs = {}
    for name, each in list(passes.items()):
        if name not in apart_too and (out := attempt(name, each.last)) is not None:
            outs[name] = out
    first, *rest = outs or [""]
    differ = {name: apart(outs[name], outs[first]) for name in rest}
    problems += [
        f"{name} and {first} {e:.3f} apart"
        for name, e in differ.items()
        if not e <= most(name, first)
    ]
    outs.clear()
    timer = time_on_gpu if on_gpu else time_on_cpu
    timer(passes, WARM)
    begin = time.time()
    times = timer(passes, rounds)
    clocks.busy.append((begin, time.time()))
    calls = len(given)
    return {n: [ms / calls for ms in found] for n, found in times.items()}, differ, problems


def measure_row(
    layers: Mapping[str, Layer],
    given: Sequence[Batch],
    rounds: int,
    clocks: Clocks,
    shared: SharedExpert | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """Medians and quartiles, in ms a call; what went wrong.

    Args:
        shared: is timed alone, and each layer beside it: the row's ``shared`` and ``beside``.
    """
    times, differ, problems = timed(layers, given, rounds, clocks)
    row: dict[str, Any] = {
        "tokens": len(given[0].x),
        "active": statistics.fmean(active_experts(b.ids) for b in given),
        "ms": {name: statistics.median(values) for name, values in times.items()},
        "iqr": {name: statistics.quantiles(values, n=4)[::2] for name, values in times.items()},
        "apart": differ,
    }
    if shared is not None:
        both = {name: Beside(layers[name], shared) for name in times}
        times, _, more = timed(both, given, rounds, clocks, {"shared expert": shared})
        beside = {name: statistics.median(values) for name, values in times.items()}
        row["shared"] = beside.pop("shared expert", None)
        row["beside"] = beside
        problems += [f"beside a shared expert: {problem}" for problem in more]
    return row, problems


def check_outputs(
    shape: Shape,
    w13: Stored,
    w2: Stored,
    layers: Mapping[str, Layer],
    given: Batch,
    biases: Biases | None = None,
) -> tuple[dict[str, float], list[str]]:
    """Relative errors of all pairs, plain float32 arithmetic among them; which are too large."""
    outs, problems = {}, []
    for name, layer in layers.items():
        try:
            outs[name] = layer(given).float().clone()
        except Exception as error:  # the others are compared all the same
            problems.append(f"{name}: {type(error).__name__}: {str(error)[:1000]}")
    outs["plain"] = plain(shape, w13, w2, given, biases)
    names = list(outs)
    errors = {
        f"{one}/{other}": apart(outs[one], outs[other])
        for place, one in enumerate(names)
        for other in names[place + 1 :]
    }
    problems += [
        f"{pair} {error:.3f} apart"
        for pair, error in errors.items()
        if not error <= most(*pair.split("/"))
    ]
    return errors, problems


class Runner:
    """All shapes, one after the other; what has been found is saved after each token count."""

    def __init__(self, args: argparse.Namespace, clocks: Clocks) -> None:
        self.args, self.clocks = args, clocks
        self.device = device_of(args)
        self.deadline = time.monotonic() + args.limit
        self.stopped = False
        self.run: dict[str, Any] = {"about": about(args), "shapes": [], "problems": []}

    def late(self) -> bool:
        """Whether to stop."""
        self.stopped = self.stopped or time.monotonic() > self.deadline
        return self.stopped

    def wrong(self, problem: str) -> None:
        self.run["problems"].append(problem)
        print(f"WRONG {problem}", flush=True)

    def save(self) -> None:
        if self.args.out:
            new = self.args.out.with_name(self.args.out.name + ".new")
            new.write_text(json.dumps(self.run, indent=1))
            new.replace(self.args.out)

    def shape(self, shape: Shape) -> None:
        """Build, compare, time and print."""
        print(f"\n### {title(shape)}", flush=True)
        where = f"{shape.name} tp{shape.tp}"
        generator = torch.Generator(self.device).manual_seed(0)
        w13, w2 = random_weights(shape, generator)
        biases = random_biases(shape, generator)
        saved: dict[str, Any] = {"shape": asdict(shape), "kernels": {}, "errors": {}, "rows": []}
        layers: dict[str, Layer] = {}
        for name in self.args.kernels:
            begin = time.monotonic()
            try:
                layers[name] = made(name, shape, w13, w2, biases, self.device.type)
            except AbsentError as error:
                saved.setdefault("absent", {})[name] = str(error)
                print(f"{TITLES[name]}: absent: {error}", flush=True)
                continue
            except Exception as error:
                self.wrong(f"{where}: {name}: {type(error).__name__}: {str(error)[:1000]}")
                if name == "ours":
                    return  # nothing to compare with: no GPU time for the others alone
                continue
            saved["kernels"][name] = layers[name].kernel
            seconds = time.monotonic() - begin
            print(f"{TITLES[name]}: {layers[name].kernel}, built in {seconds:.1f} s", flush=True)
        self.run["shapes"].append(saved)
        try:
            given = batch(shape, CHECKED, self.args.skewed, generator)
            saved["errors"], problems = check_outputs(shape, w13, w2, layers, given, biases)
        except Exception as error:
            problems = [f"{type(error).__name__}: {str(error)[:1000]}"]
        for problem in problems:
            self.wrong(f"{where}, {CHECKED} tokens: {problem}")
        errors = ", ".join(f"{pair} {error:.4f}" for pair, error in saved["errors"].items())
        print(f"relative errors: {errors}", flush=True)
        del w13, w2
        shared = SharedExpert(shape, generator) if self.args.shared_expert else None
        for tokens in self.args.tokens:
            if self.late():
                break
            routings = [
                batch(shape, tokens, self.args.skewed, generator) for _ in range(batches(tokens))
            ]
            row, problems = measure_row(layers, routings, self.args.rounds, self.clocks, shared)
            if routings[0].x.is_cuda:
                torch.cuda.empty_cache()  # the graphs' own pools, which nobody holds by now
            saved["rows"].append(row)
            for problem in problems:
                self.wrong(f"{where}, {tokens} tokens: {problem}")
            times = ", ".join(f"{name} {number(ms)}" for name, ms in row["ms"].items())
            print(f"{tokens} tokens: {times}", flush=True)
            self.save()
        saved["clocks"] = self.clocks.during()
        print(table(saved, self.run["about"]))
        if shared is not None:
            print(f"\nBeside a shared expert:\n\n{beside_table(saved)}\n")
        print("\n".join(summary(saved, self.run["about"])))
        print(f"clocks while timing, MHz, least, median and most: {saved['clocks']}", flush=True)
        self.save()


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on, and the floors' numbers."""
    from importlib.metadata import version

    from vllm_nvfp4_moe.versions import installed_version

    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "vllm": installed_version(),
        "plugin": version("vllm-nvfp4-moe"),
        "routing": "skewed" if args.skewed else "uniform",
        "rounds": args.rounds,
        "bandwidth": args.bandwidth,
        "flops": args.flops,
    }
    if args.device == "cuda":
        fields = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
        done = subprocess.run(Clocks.query(fields), capture_output=True, text=True, check=False)
        said = [part.strip() for part in done.stdout.split(",")]
        names = ("device", "driver", "SM MHz before", "memory MHz before", "SM MHz at most")
        found["device"] = torch.cuda.get_device_name(0)
        if not done.returncode:
            found |= dict(zip((*names, "memory MHz at most", "W at most"), said, strict=True))
        found["cuda"] = torch.version.cuda
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = {**SHAPES, **MORE}
    parser.add_argument("--shapes", nargs="+", choices=every, default=list(SHAPES))
    parser.add_argument("--tp", nargs="+", type=int, choices=(1, 2, 4, 8), default=[1, 2, 4, 8])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--kernels", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--skewed", action="store_true", help="few experts get most tokens")
    parser.add_argument(
        "--shared-expert", action="store_true", help="time each kernel beside one, too"
    )
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s, for the floor")
    parser.add_argument("--flops", type=float, default=790, help="TFLOP/s, for the floor")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed replays")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds to stop after")
    parser.add_argument("--out", type=Path, help="results in JSON, written after each row")
    parser.add_argument("--table", nargs="+", type=Path, help="print these saved runs, and stop")
    parser.add_argument("--device", default="cuda", choices=WAYS)
    args = parser.parse_args(arguments)
    if min(args.tokens) < 1:
        parser.error("--tokens: at least 1")
    if args.rounds < 2:
        parser.error("--rounds: at least 2, for quartiles")
    here = {**WAYS[args.device], **PEERS[args.device]}
    args.kernels = [name for name in TITLES if name in here and name in args.kernels]  # ours first
    return args


def device_of(args: argparse.Namespace) -> torch.device:
    return torch.device(args.device, 0) if args.device == "cuda" else torch.device(args.device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; the exit code."""
    args = parse(arguments)
    if args.table:
        for file in args.table:
            print(report(json.loads(file.read_text())))
        return 0
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    device = device_of(args)
    with Clocks(device) as clocks:
        runner = Runner(args, clocks)
        print("; ".join(f"{key} {value}" for key, value in runner.run["about"].items()), flush=True)
        with one_rank(device):
            # All models whole before their slices: what matters most, should time run out.
            for tp in args.tp:
                for name in args.shapes:
                    if runner.late():
                        break
                    shape = {**SHAPES, **MORE}[name]
                    if not shape.divides(tp):
                        print(f"\n{name} has no slices of whole blocks for {tp} ranks: left out")
                        continue
                    runner.shape(shape.slice(tp))
                    gc.collect()
                    if args.device == "cuda":
                        torch.cuda.empty_cache()
    if runner.stopped:
        print("stopped by --limit")
    runner.save()
    problems = runner.run["problems"]
    print("\n".join(f"WRONG {problem}" for problem in problems) or "VERDICT all kernels agree")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
