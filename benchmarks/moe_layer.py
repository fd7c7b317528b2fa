"""One routed-experts layer in vLLM: our Hopper kernel beside Humming, Marlin and bf16, in one run.

    python -m benchmarks.moe_layer [--shapes minimax-m3] [--tp 1 2 4 8] [--out results.json]
    python -m benchmarks.moe_layer --table results.json    Markdown of saved runs, without a GPU

Every kernel runs in the layer that vLLM builds, from the same random weights (bf16 gets them
dequantized: global scales are powers of two, so that it loses nothing). The router is outside: all
get the same ``topk_weights`` and ``topk_ids``. Times are medians of replays of a CUDA graph, the
kernels' replays taking turns; a graph holds up to 8 routings, so that one's weights are not in L2
for the next. All layers of a shape are on the GPU at once, 55 GB at most.

The floor is the larger of: the active experts' weights at 4.5 bits over ``--bandwidth``, and the
multiplications and additions over ``--flops``. A tensor-parallel slice is one rank's GEMMs, without
communication. Before the timing, 32 tokens are compared with plain float32 arithmetic and between
the kernels; after it, what the graphs computed. Beyond 3 % is WRONG: exit code 1.
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
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from quantize.gates import Gate, Gates
from quantize.layouts import LAYOUTS
from quantize.nvfp4 import BLOCK, E2M1_VALUES, dequantize

TOKENS = tuple(2**n for n in range(15))
BYTES = 4.5 / 8
"""Of a weight."""
APART = 0.03
"""Relative error from which a kernel is wrong."""
CHECKED = 32
"""Tokens that are compared before the timing."""
WARM, ROUNDS = 3, 15
"""Replays of each graph before the timed ones, and those."""
GOAL = {"geomean": 1.3, "memory": 0.80, "flops": 0.70}
TITLES = {"ours": "ours", "humming": "Humming", "marlin": "Marlin", "bf16": "bf16 Triton"}

SILU = Gate("silu")


@dataclass(frozen=True)
class Shape:
    """A layer's sizes on one rank of ``tp``; ``top_k`` experts a token."""

    name: str
    experts: int
    hidden: int
    intermediate: int
    top_k: int
    gate: Gate = SILU
    tp: int = 1

    def slice(self, tp: int) -> Shape:
        """One rank's."""
        return replace(self, intermediate=self.intermediate // tp, tp=tp)

    @property
    def weights(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.intermediate


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("minimax-m3", 128, 6144, 3072, 4, Gate("swiglu_oai", 1.702, 1.0, 7.0)),
        Shape("qwen3-235b", 128, 4096, 1536, 8),
        Shape("deepseek-v3", 256, 7168, 2048, 8),
    )
}


# Floors, tables and verdicts: from saved numbers alone.


class Floor(NamedTuple):
    """Milliseconds that reading the weights and that computing take at least."""

    memory: float
    flops: float

    @property
    def ms(self) -> float:
        return max(self)

    @property
    def bound(self) -> str:
        return "memory" if self.memory >= self.flops else "FLOPs"


def floor(shape: Shape, tokens: int, active: float, bandwidth: float, flops: float) -> Floor:
    """Of one call.

    Args:
        active: experts that any token goes to.
        bandwidth: TB/s.
        flops: TFLOP/s.
    """
    read = active * shape.weights * BYTES
    computed = 2 * tokens * shape.top_k * shape.weights
    return Floor(read / bandwidth / 1e9, computed / flops / 1e9)


def active_experts(ids: torch.Tensor) -> int:
    """How many experts int32 ``[tokens, k]`` names; negative ones are nobody's."""
    return int(ids[ids >= 0].unique().numel())


class Row:
    """One token count of a saved run."""

    def __init__(self, shape: Shape, saved: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        self.tokens: int = saved["tokens"]
        self.active: float = saved["active"]
        self.ms: dict[str, float] = saved["ms"]
        self.floor = floor(shape, self.tokens, self.active, about["bandwidth"], about["flops"])
        others = [ms for name, ms in self.ms.items() if name != "ours"]
        ours = self.ms.get("ours")
        self.ratio = min(others) / ours if ours and others else None
        """Of the best other's time to ours: above 1 where ours is faster."""

    def reached(self, bound: float) -> float | None:
        """``bound`` (ms) over our time; None if ours was not timed."""
        return bound / self.ms["ours"] if "ours" in self.ms else None


def _number(value: float | None) -> str:
    """Milliseconds, to about three digits."""
    if value is None:
        return "-"
    return f"{value:.{4 if value < 0.1 else 3 if value < 10 else 2}f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _restored(saved: Mapping[str, Any]) -> Shape:
    sizes = saved["shape"]
    return Shape(**{**sizes, "gate": Gate(**sizes["gate"])})


def _rows(saved: Mapping[str, Any], about: Mapping[str, Any]) -> list[Row]:
    return [Row(_restored(saved), row, about) for row in saved["rows"]]


def table(saved: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """Markdown of one shape's rows, in milliseconds."""
    kernels = [name for name in TITLES if name in saved["kernels"]]
    head = ["tokens", "experts", *(TITLES[name] for name in kernels)]
    head += ["floor", "bound", "best other / ours", "floor / ours"]
    lines = [f"| {' | '.join(head)} |", "| ---: " * len(head) + "|"]
    for row in _rows(saved, about):
        cells = [str(row.tokens), f"{row.active:.0f}", *(_number(row.ms.get(k)) for k in kernels)]
        cells += [_number(row.floor.ms), row.floor.bound]
        cells += [_share(row.ratio), _share(row.reached(row.floor.ms))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(saved: Mapping[str, Any], about: Mapping[str, Any]) -> list[str]:
    """How much faster ours is; for MiniMax-M3 whether its goals hold."""
    rows = _rows(saved, about)
    ratios = {row.tokens: row.ratio for row in rows if row.ratio is not None}
    if not ratios:
        return []
    mean = statistics.geometric_mean(ratios.values())
    worst = min(ratios, key=lambda tokens: ratios[tokens])
    lines = [
        f"best other / ours: geometric mean {mean:.3f} of {len(ratios)} token counts, "
        f"smallest {ratios[worst]:.3f} at {worst}"
    ]
    shape = _restored(saved)
    if (shape.name, shape.tp, about["routing"]) != ("minimax-m3", 1, "uniform"):
        return lines
    memory = [row.reached(row.floor.memory) for row in rows if 16 <= row.tokens <= 256]
    flops = [row.reached(row.floor.flops) for row in rows if row.tokens == 8192]
    goals: list[tuple[str, float | None, float]] = [
        ("geometric mean of best other / ours", mean, GOAL["geomean"]),
        ("smallest of best other / ours", ratios[worst], 1.0),
        ("smallest memory floor / ours at 16 to 256", _least(memory), GOAL["memory"]),
        ("FLOP floor / ours at 8192", _least(flops), GOAL["flops"]),
    ]
    for what, found, wanted in goals:
        if found is None:
            lines.append(f"GOAL not measured: {what}, at least {wanted:.2f}")
        else:
            holds = "holds" if found >= wanted else "MISSED"
            lines.append(f"GOAL {holds}: {what} {found:.3f}, at least {wanted:.2f}")
    return lines


def _least(values: Sequence[float | None]) -> float | None:
    """The smallest; None where there are none, or one is missing."""
    found = [value for value in values if value is not None]
    return min(found) if found and len(found) == len(values) else None


def title(shape: Shape) -> str:
    return (
        f"{shape.name}, tensor parallel {shape.tp}: {shape.experts} experts, "
        f"{shape.hidden} x {shape.intermediate}, top {shape.top_k}, {shape.gate}"
    )


def report(run: Mapping[str, Any]) -> str:
    """A whole saved run in Markdown."""
    about = run["about"]
    parts = ["; ".join(f"{key} {value}" for key, value in about.items())]
    for saved in run["shapes"]:
        kernels = ", ".join(f"{TITLES[k]}: {name}" for k, name in saved["kernels"].items())
        parts += [f"### {title(_restored(saved))}", table(saved, about), f"Kernels: {kernels}."]
        parts += ["\n".join(f"- {line}" for line in summary(saved, about))]
    parts += [f"WRONG {problem}" for problem in run["problems"]]
    return "\n\n".join(part for part in parts if part)


# Inputs.


class Batch(NamedTuple):
    """One call's input: bf16 ``[tokens, hidden]``, float32 and int32 ``[tokens, k]``."""

    x: torch.Tensor
    weights: torch.Tensor
    ids: torch.Tensor


def batches(tokens: int) -> int:
    """How many to a graph."""
    return 8 if tokens <= 256 else 2 if tokens <= 2048 else 1


def batch(shape: Shape, tokens: int, skewed: bool, generator: torch.Generator) -> Batch:
    """Random tokens.

    Args:
        skewed: the n-th most popular expert is chosen about as often as 1 / n; which one that is
            differs from batch to batch, as from layer to layer of a model.
    """
    device = generator.device
    x = torch.randn(tokens, shape.hidden, device=device, generator=generator).bfloat16()
    weights = torch.rand(tokens, shape.top_k, device=device, generator=generator) + 0.1
    noise = torch.rand(tokens, shape.experts, device=device, generator=generator)
    # Gumbel noise: the largest k are draws without replacement.
    score = -(-noise.clamp(1e-7, 1 - 1e-7).log()).log()
    if skewed:
        rank = torch.randperm(shape.experts, device=device, generator=generator) + 1
        score = score - rank.log()
    ids = score.topk(shape.top_k, dim=-1).indices.int().contiguous()
    return Batch(x, weights / weights.sum(1, keepdim=True), ids)


class Stored(NamedTuple):
    """All experts' matrices: codes uint8 ``[experts, out, in / 2]``, E4M3 block scales
    ``[experts, out, in / 16]``, global scales float32 ``[experts]``."""

    codes: torch.Tensor
    block_scale: torch.Tensor
    global_scale: torch.Tensor

    def weight(self, expert: int) -> torch.Tensor:
        """Float32 ``[out, in]``."""
        return dequantize(*(part[expert] for part in self))


def random_weights(shape: Shape, generator: torch.Generator) -> tuple[Stored, Stored]:
    """Gate above up, and down: random codes, block scales from 1 to 15.

    What goes into the gate has a standard deviation of about 3, half or twice that for some
    experts; outputs are about as large.
    """
    device = generator.device

    def draw(*dims: int, low: int = 0, high: int = 256) -> torch.Tensor:
        return torch.randint(low, high, dims, dtype=torch.uint8, device=device, generator=generator)

    def root_mean_square(values: torch.Tensor) -> float:
        return float(values.square().mean().sqrt())

    low, high = 0x38, 0x58  # 1 and 16
    every = torch.arange(low, high, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    unit = root_mean_square(torch.tensor(E2M1_VALUES)) * root_mean_square(every)

    def matrices(rows: int, columns: int, std: float) -> Stored:
        spread = draw(shape.experts, high=3).float() - 1
        return Stored(
            draw(shape.experts, rows, columns // 2),
            draw(shape.experts, rows, columns // BLOCK, low=low, high=high).view(
                torch.float8_e4m3fn
            ),
            (round(math.log2(std / unit)) + spread).exp2(),
        )

    w13 = matrices(2 * shape.intermediate, shape.hidden, 3 / math.sqrt(shape.hidden))
    return w13, matrices(shape.hidden, shape.intermediate, 0.5 / math.sqrt(shape.intermediate))


def plain(shape: Shape, w13: Stored, w2: Stored, given: Batch) -> torch.Tensor:
    """The routed experts' output in float32, ``[tokens, hidden]``."""
    out = torch.zeros_like(given.x, dtype=torch.float32)
    for expert in given.ids.unique().tolist():
        token, slot = (given.ids == expert).nonzero(as_tuple=True)
        middle = shape.gate.apply_stacked(given.x[token].float() @ w13.weight(expert).T)
        result = middle @ w2.weight(expert).T
        out.index_add_(0, token, result * given.weights[token, slot].unsqueeze(1))
    return out


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Euclidean norm of the difference over that of ``other``; NaN if anything is."""
    other = other.float()
    return float((one.float() - other).norm() / other.norm())


# Layers.


class Way(NamedTuple):
    """vLLM's ``moe_backend``, and what must come of it: the method's class, its kernel's name."""

    backend: str
    method: str
    kernel: str


WAYS = {
    "cuda": {
        "ours": Way("auto", "HopperMethod", "HOPPER"),
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


class WrongKernelError(Exception):
    """Another kernel runs than was asked for."""


class Layer:
    """A built layer, called below its router."""

    def __init__(self, experts: Any, config: Any) -> None:
        self.experts = experts
        self.method = experts.quant_method
        self.config = config

    def __call__(self, given: Batch) -> torch.Tensor:
        """bf16 ``[tokens, hidden]``; the memory may be a workspace that the next call reuses."""
        from vllm.forward_context import set_forward_context

        with (
            torch.inference_mode(),
            set_forward_context(None, self.config, num_tokens=len(given.x)),
        ):
            return self.method.apply(self.experts, *given, None, None)

    @property
    def kernel(self) -> str:
        """The name of what runs."""
        if hasattr(self.method, "kernel"):
            return str(self.method.kernel)
        return f"{self.method.unquantized_backend.value} ({self.method.experts_cls.__name__})"

    def check(self, way: Way) -> None:
        """Raises WrongKernelError if this is not the kernel of ``way``."""
        found = type(self.method).__name__
        if found != way.method or not self.kernel.startswith(way.kernel):
            passed = getattr(self.method, "passed_over", ())
            raise WrongKernelError(
                f"{found} runs {self.kernel}, where {way.method} {way.kernel} was asked for; "
                f"passed over: {'; '.join(map(str, passed)) or 'none'}"
            )


@contextlib.contextmanager
def one_rank(device: torch.device) -> Iterator[None]:
    """This process is a rank of one, as vLLM's worker is before it builds a model."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import (
        destroy_distributed_environment,
        destroy_model_parallel,
    )

    if device.type == "cuda":
        from vllm.v1.worker.workspace import init_workspace_manager

        torch.cuda.set_device(device)
        init_workspace_manager(device)
    else:
        from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

        _set_torch_accelerator_to_noop()
    if torch.distributed.is_initialized():  # by others in this process, who also end it
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        with set_current_vllm_config(VllmConfig()):
            backend = "nccl" if device.type == "cuda" else "gloo"
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, backend)
            initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            destroy_model_parallel()
            destroy_distributed_environment()


def build(shape: Shape, w13: Stored, w2: Stored, way: Way) -> Layer:
    """vLLM's layer with these weights, converted for its kernel; quantized by this package's
    method, unless ``way`` is that of bf16.

    Raises:
        WrongKernelError: before anything is converted.
    """
    from vllm.config import LoadConfig, VllmConfig, set_current_vllm_config
    from vllm.config.kernel import KernelConfig
    from vllm.model_executor.layers.fused_moe import FusedMoEFactory

    from vllm_nvfp4_moe.config import NvFp4MoEConfig

    device, gate = w13.codes.device, shape.gate
    quantization, told = None, {}
    if way.method != "UnquantizedFusedMoEMethod":
        quantization = NvFp4MoEConfig.from_config(LAYOUTS["modelopt"].quantization_config([]))
        quantization.gates = Gates.uniform(gate)
    elif gate.form == "swiglu_oai":  # as vLLM's MiniMax-M3 says it
        told = {
            "activation": "swigluoai_uninterleave",
            "swiglu_alpha": gate.alpha,
            "swiglu_beta": gate.beta,
            "swiglu_limit": gate.limit,
        }
    config = VllmConfig(
        # Weights come all at once, not through loaders that count them; this benchmark compares
        # outputs itself.
        load_config=LoadConfig(load_format="dummy"),
        kernel_config=KernelConfig(moe_backend=way.backend),
    )
    with set_current_vllm_config(config), torch.device(device):
        runner = FusedMoEFactory(
            num_experts=shape.experts,
            top_k=shape.top_k,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            params_dtype=torch.bfloat16,
            quant_config=quantization,
            prefix="model.layers.0.mlp.experts",
            **told,
        )
        layer = Layer(runner.routed_experts, config)
        layer.check(way)
        fill(layer.experts, w13, w2)
        layer.method.process_weights_after_loading(layer.experts)
    return layer


def fill(experts: Any, w13: Stored, w2: Stored) -> None:
    """Put the weights where a checkpoint's would be, as they are or dequantized."""
    parameters = dict(experts.named_parameters())
    for prefix, stored in (("w13", w13), ("w2", w2)):
        weight = parameters[f"{prefix}_weight"].data
        if weight.dtype == torch.bfloat16:
            for expert in range(len(weight)):
                weight[expert].copy_(stored.weight(expert))
            continue
        suffixes = LAYOUTS["modelopt"].suffixes
        codes, scales, globals_, inputs = (parameters[f"{prefix}_{s}"].data for s in suffixes)
        codes.copy_(stored.codes)
        scales.copy_(stored.block_scale)
        # Of w13, a pair each.
        globals_.copy_(stored.global_scale.view(-1, *[1] * (globals_.ndim - 1)).expand_as(globals_))
        inputs.fill_(1.0)


# Timing.


class Pass:
    """A layer's calls with all batches: one CUDA graph; on a CPU they are made anew."""

    def __init__(self, layer: Layer, given: Sequence[Batch]) -> None:
        self.layer, self.given = layer, given
        self.graph: Any = None
        self._call()

    def capture(self) -> None:
        """Only after every other layer has been called with as many tokens: what vLLM's workspace
        was before it grew, the graph would still write to."""
        if self.given[0].x.is_cuda:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self._call()

    def _call(self) -> None:
        self.outs = [self.layer(given) for given in self.given]

    def __call__(self) -> None:
        if self.graph is None:
            self._call()
        else:
            self.graph.replay()

    def last(self) -> torch.Tensor:
        """A copy of what it gives for the last batch."""
        self()
        return self.outs[-1].clone()


def time_on_gpu(calls: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, which take turns; nothing is waited for in between."""
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
            begin.record()
            call()
            end.record()
            marks[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [b.elapsed_time(e) for b, e in pairs] for name, pairs in marks.items()}


def time_on_cpu(calls: Mapping[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """The same."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            found[name].append((time.perf_counter() - begin) * 1e3)
    return found


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


def measure_row(
    layers: Mapping[str, Layer], given: Sequence[Batch], rounds: int, clocks: Clocks
) -> tuple[dict[str, Any], list[str]]:
    """Medians and quartiles, in ms a call; what went wrong."""
    problems: list[str] = []
    passes: dict[str, Pass] = {}

    def attempt(name: str, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # the others' figures must not be lost
            problems.append(f"{name}: {type(error).__name__}: {str(error)[:500]}")
            passes.pop(name, None)
            return None

    on_gpu = given[0].x.is_cuda
    for name, layer in layers.items():
        if (made := attempt(name, partial(Pass, layer, given))) is not None:
            passes[name] = made
    for name, each in list(passes.items()):
        attempt(name, each.capture)
    outs = {}
    for name, each in list(passes.items()):
        if (out := attempt(name, each.last)) is not None:
            outs[name] = out
    first, *rest = outs or [""]
    differ = {name: apart(outs[name], outs[first]) for name in rest}
    problems += [
        f"{name} and {first} {e:.3f} apart" for name, e in differ.items() if not e <= APART
    ]
    outs.clear()
    timer = time_on_gpu if on_gpu else time_on_cpu
    timer(passes, WARM)
    begin = time.time()
    times = timer(passes, rounds)
    clocks.busy.append((begin, time.time()))
    calls = len(given)
    row = {
        "tokens": len(given[0].x),
        "active": statistics.fmean(active_experts(b.ids) for b in given),
        "ms": {name: statistics.median(values) / calls for name, values in times.items()},
        "iqr": {
            name: [q / calls for q in statistics.quantiles(values, n=4)[::2]]
            for name, values in times.items()
        },
        "apart": differ,
    }
    return row, problems


def check_outputs(
    shape: Shape, w13: Stored, w2: Stored, layers: Mapping[str, Layer], given: Batch
) -> tuple[dict[str, float], list[str]]:
    """Relative errors of all pairs, plain float32 arithmetic among them; which are too large."""
    outs = {name: layer(given).float().clone() for name, layer in layers.items()}
    outs["plain"] = plain(shape, w13, w2, given)
    names = list(outs)
    errors = {
        f"{one}/{other}": apart(outs[one], outs[other])
        for place, one in enumerate(names)
        for other in names[place + 1 :]
    }
    return errors, [
        f"{pair} {error:.3f} apart" for pair, error in errors.items() if not error <= APART
    ]


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
        saved: dict[str, Any] = {"shape": asdict(shape), "kernels": {}, "errors": {}, "rows": []}
        layers: dict[str, Layer] = {}
        for name in self.args.kernels:
            begin = time.monotonic()
            try:
                layers[name] = build(shape, w13, w2, WAYS[self.device.type][name])
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
            saved["errors"], problems = check_outputs(shape, w13, w2, layers, given)
        except Exception as error:
            problems = [f"{type(error).__name__}: {str(error)[:1000]}"]
        for problem in problems:
            self.wrong(f"{where}, {CHECKED} tokens: {problem}")
        errors = ", ".join(f"{pair} {error:.4f}" for pair, error in saved["errors"].items())
        print(f"relative errors: {errors}", flush=True)
        del w13, w2
        for tokens in self.args.tokens:
            if self.late():
                break
            made = [
                batch(shape, tokens, self.args.skewed, generator) for _ in range(batches(tokens))
            ]
            row, problems = measure_row(layers, made, self.args.rounds, self.clocks)
            if made[0].x.is_cuda:
                torch.cuda.empty_cache()  # the graphs' own pools, which nobody holds by now
            saved["rows"].append(row)
            for problem in problems:
                self.wrong(f"{where}, {tokens} tokens: {problem}")
            times = ", ".join(f"{name} {_number(ms)}" for name, ms in row["ms"].items())
            print(f"{tokens} tokens: {times}", flush=True)
            self.save()
        saved["clocks"] = self.clocks.during()
        print(table(saved, self.run["about"]))
        print("\n".join(summary(saved, self.run["about"])))
        print(f"clocks while timing, MHz, least, median and most: {saved['clocks']}", flush=True)
        self.save()


def about(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures were measured on, and the floors' numbers."""
    from importlib.metadata import version

    from vllm_nvfp4_moe.compat import installed_version

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
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tp", nargs="+", type=int, choices=(1, 2, 4, 8), default=[1, 2, 4, 8])
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--kernels", nargs="+", choices=TITLES, default=list(TITLES))
    parser.add_argument("--skewed", action="store_true", help="few experts get most tokens")
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s, for the floor")
    parser.add_argument("--flops", type=float, default=790, help="TFLOP/s, for the floor")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed replays")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds to stop after")
    parser.add_argument("--out", type=Path, help="results in JSON, written after each row")
    parser.add_argument("--table", nargs="+", type=Path, help="print these saved runs, and stop")
    parser.add_argument("--device", default="cuda", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if min(args.tokens) < 1:
        parser.error("--tokens: at least 1")
    if args.rounds < 2:
        parser.error("--rounds: at least 2, for quartiles")
    args.kernels = [name for name in TITLES if name in args.kernels]  # ours first
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
                    runner.shape(SHAPES[name].slice(tp))
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
