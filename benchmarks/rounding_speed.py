"""Seconds an expert of each rounding method at MiniMax-M3's sizes, beside ModelOpt's recipes.

    python -m benchmarks.rounding_speed [--experts 16] [--samples 32] [--length 2048] [--gpus 1 2]

Four tables, of random weights and of text that is random tokens:

1. **a layer**: ``quantize`` with calibration, with ``two-sided`` the way back through the model
   too. Seconds an expert are those from a layer's first expert to its last, from reading weights to
   writing results; beside them the whole run has what a real model has once for many layers.
   ``--gpus 1 2 8`` does it with each of these numbers of GPUs;
2. **ModelOpt's recipes** (``benchmarks.peers``) of the same model and tokens, where it can be
   imported; after a first run of two short texts, in which its kernels are compiled;
3. **parts** of one expert: second moments, GPTQ's factor, rounding, what the report compares;
4. **losses** in float64 of the kernels and of the loops in PyTorch or numba, with the same first
   ``--rows`` rows of an expert's gate and correlated inputs. The loops take minutes there.

On a CPU there are no kernels, and the fourth table has one column. Small sizes then:

    python -m benchmarks.rounding_speed --experts 2 --hidden 256 --intermediate 128 --samples 4 \\
        --length 128 --rows 32

What should come out is in docs/contributors/rounding-on-gpus.md.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

import quantize.nvfp4.rounding.descent as descent_file
import quantize.nvfp4.rounding.gptq as gptq_file
import quantize.nvfp4.rounding.two_sided as two_sided_file
from benchmarks import m3_checkpoint, peers
from quantize.calibration.product import Product
from quantize.calibration.quantizer import Quantizer
from quantize.calibration.routing import CHUNK
from quantize.calibration.samples import digest_of
from quantize.calibration.second_moments import SecondMoments
from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.nvfp4.format import NvFp4, pack, unpack
from quantize.nvfp4.kernels import for_device
from quantize.nvfp4.rounding import METHODS
from quantize.nvfp4.rounding.method import Job, Rounded
from quantize.run.options import Calibration, Options
from quantize.run.plan import plan
from quantize.run.workers import all_devices

SEED = 18
TOP_K = 4


@contextmanager
def watched() -> Iterator[list[float]]:
    """Seconds between a layer's first expert and its last, of each layer."""
    seconds: list[float] = []
    begin, end = Quantizer.begin, Quantizer.end

    def timed_begin(self: Quantizer, *args: Any) -> None:
        begin(self, *args)
        seconds.append(-time.perf_counter())

    def timed_end(self: Quantizer) -> None:
        end(self)
        seconds[-1] += time.perf_counter()

    Quantizer.begin, Quantizer.end = timed_begin, timed_end  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Quantizer.begin, Quantizer.end = begin, end  # type: ignore[method-assign]


class Bench:
    """Times on one device; ``args`` are the command's."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.tokens = torch.randint(
            3, 4096, (args.samples, args.length), generator=torch.Generator().manual_seed(SEED)
        )

    def seconds(self, what: Callable[[], Any]) -> tuple[float, Any]:
        """How long ``what`` takes, and what it returns."""
        self._wait()
        start = time.perf_counter()
        result = what()
        self._wait()
        return time.perf_counter() - start, result

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def write(self, folder: Path) -> None:
        """Write the model: one layer."""
        m3_checkpoint.write(
            folder, 1, quantized=False, experts=self.args.experts, hidden=self.args.hidden,
            intermediate=self.args.intermediate,
        )  # fmt: skip

    def layer(
        self, source: Path, target: Path, method: str, tokens: torch.Tensor, gpus: int = 1
    ) -> tuple[float, float]:
        """Seconds to quantize the model with calibration; and those of the experts alone, from
        their layer's first to its last."""
        devices = [self.device] if gpus == 1 else all_devices()[:gpus]
        settings = Calibration("random", *tokens.shape, digest_of(tokens), method=method)
        with Checkpoint(source) as checkpoint:
            steps = plan(checkpoint, Options(calibration=settings, activations=True))
            with watched() as alone:
                took, _ = self.seconds(
                    lambda: execute(
                        checkpoint, steps, target, overwrite=True, devices=devices,
                        samples=tokens,
                    )
                )  # fmt: skip
        return took, sum(alone)

    def modelopt(self, source: Path, recipe: str) -> float:
        """Seconds of one of ModelOpt's recipes, without loading the model: Transformers' class with
        weights of its own, since it does not read the names that the hub has."""
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(source).get_text_config()

        def model() -> Any:
            with self.device:
                return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

        peers.modelopt(model(), recipe, self.tokens[:2, :64].tolist())
        loaded = model()
        return self.seconds(lambda: peers.modelopt(loaded, recipe, self.tokens.tolist()))[0]

    def inputs(self, size: int, tokens: int) -> torch.Tensor:
        """Correlated inputs, bf16: a mixture of directions, a few of them large."""
        generator = torch.Generator(self.device).manual_seed(SEED)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, device=self.device)

        mix = normal(size, size) / size**0.5
        few = normal(8, size)
        parts = [
            (x @ (torch.eye(size, device=self.device) + mix) + 2 * normal(len(x), 8) @ few)
            .bfloat16()
            for x in normal(tokens, size).split(CHUNK)
        ]  # fmt: skip
        return torch.cat(parts)

    def moments(self, x: torch.Tensor) -> SecondMoments:
        """Of inputs with router weights."""
        found = SecondMoments(x.shape[1], self.device)
        for part in x.split(CHUNK):
            found.add(part, torch.linspace(0.1, 0.9, len(part), device=self.device))
        return found

    def product(self, rows: int, columns: int, two_sided: bool) -> tuple[Product, float]:
        """A product of one expert: weights of ``[rows, columns]``; and seconds of its moments."""
        weight = torch.randn(rows, columns, device=self.device).bfloat16() * 0.02
        tokens = max(64, self.tokens.numel() * min(TOP_K, self.args.experts) // self.args.experts)
        x = self.inputs(columns, tokens)
        self.moments(x[:64])
        took, inputs = self.seconds(lambda: self.moments(x))
        gradients = None
        if two_sided:
            g = self.inputs(rows, tokens)
            more, gradients = self.seconds(lambda: self.moments(g))
            took += more
        return Product([weight], inputs, gradients), took

    def parts(self, name: str) -> dict[str, float]:
        """Seconds an expert."""
        method, kernel = METHODS[name], for_device(self.device)
        count = self.args.together if method.together and self.device.type == "cuda" else 1
        hidden, inner = self.args.hidden, self.args.intermediate
        took = dict.fromkeys(("moments", "factor", "rounding", "report"), 0.0)
        for rows, columns in ((2 * inner, hidden), (hidden, inner)):
            product, seconds = self.product(rows, columns, method.needs_output_hessian)
            took["moments"] += seconds
            job = product.job(kernel)
            method.round(*Job(job.weight[:32], job.hessian, job.global_scale))  # compiles
            took["factor"] += self.seconds(lambda job=job: gptq_file.compensation(job.hessian))[0]
            if count > 1:
                assert method.together is not None
                seconds, results = self.seconds(
                    lambda job=job: method.together([job] * count, count)
                )
                result = results[0]
            else:
                seconds, result = self.seconds(lambda job=job: method.round(*job))
            took["rounding"] += seconds / count
            stored = product.results(result, kernel)
            took["report"] += self.seconds(partial(product.errors, stored, "mse", kernel))[0]
        return took

    def losses(self, name: str) -> tuple[list[float], list[float]]:
        """Losses in float64, and seconds: of the method as it is here, and of its loops."""
        rows, columns = self.args.rows, self.args.hidden
        product, _ = self.product(rows, columns, METHODS[name].needs_output_hessian)
        job = product.job(for_device(self.device))
        found, times = [], []
        rounds: list[Callable[..., Rounded]] = [METHODS[name].round]
        if self.device.type == "cuda":
            rounds.append(LOOPS[name])
        for round_ in rounds:
            took, (codes, block_scale) = self.seconds(lambda r=round_: r(*job))
            stored = NvFp4(codes, block_scale, job.global_scale)
            difference = stored.dequantize().double() - job.weight.double()
            product_ = difference @ job.hessian.double()
            if job.output_hessian is not None:
                product_ = job.output_hessian.double() @ product_
            found.append(float((product_ * difference).sum()))
            times.append(took)
        return found, times


def _gptq(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, _: Any) -> Rounded:
    factor = gptq_file.compensation(hessian)
    codes, block_scale = gptq_file.round_columns(weight.float() / scale, factor)
    return pack(codes), block_scale


def _descent(weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, _: Any) -> Rounded:
    packed, block_scale = _gptq(weight, hessian, scale, _)
    state = descent_file.Descent(
        weight.float() / scale, gptq_file.damped(hessian, 1e-4), unpack(packed), block_scale.float()
    )
    for _sweep in range(descent_file.SWEEPS):
        state.columns()
        state.blocks()
    state.columns()
    return pack(state.codes), state.scales.to(torch.float8_e4m3fn)


def _two_sided(*job: torch.Tensor) -> Rounded:
    codes, block_scale = two_sided_file.two_sided(*(each.cpu() for each in job))
    return codes.to(job[0].device), block_scale.to(job[0].device)


LOOPS: dict[str, Callable[..., Rounded]] = {
    "gptq": _gptq,
    "descent": _descent,
    "two-sided": _two_sided,
}
"""Each method without its kernels."""


def heads(names: list[str]) -> None:
    """Print how a table in Markdown begins."""
    print("| " + " | ".join(names) + " |\n|" + " --- |" * len(names), flush=True)


def row(cells: list[str]) -> None:
    """Print one of its rows, as soon as it is known."""
    print("| " + " | ".join(cells) + " |", flush=True)


def table(names: list[str], rows: list[list[str]]) -> None:
    """Print a whole one."""
    heads(names)
    for cells in rows:
        row(cells)
    print()


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=6144)
    parser.add_argument("--intermediate", type=int, default=3072)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=256, help="of the comparison; 0 leaves it out")
    parser.add_argument("--together", type=int, default=16, help="two-sided: in the table of parts")
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[1], help="in the table of a layer: how many"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--skip", nargs="*", default=[], choices=["layer", "modelopt", "parts"])
    parser.add_argument("--work", type=Path, help="a folder for the model; else a temporary one")
    args = parser.parse_args()
    if max(args.gpus) > max(1, torch.cuda.device_count()):
        parser.error(f"--gpus: this machine has {torch.cuda.device_count()}")
    bench = Bench(args)
    where = (
        torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda"
        else platform.machine()
    )  # fmt: skip
    print(
        f"{where}, PyTorch {torch.__version__}, Triton {triton.__version__}: {args.experts} experts"
        f" of {args.hidden} x {args.intermediate}, {args.samples} x {args.length} tokens\n"
    )
    if "parts" not in args.skip:
        rows = [(name, bench.parts(name)) for name in args.methods]
        table(
            ["one expert, seconds", *rows[0][1]],
            [[name, *(f"{each:.3f}" for each in took.values())] for name, took in rows],
        )
    if args.rows:
        found = []
        for name in args.methods:
            losses, times = bench.losses(name)
            pairs = zip(losses, times, strict=True)
            found.append([name, *(f"{loss:.6g} ({took:.2f} s)" for loss, took in pairs)])
        table([f"loss of {args.rows} rows, float64", "here", "the loops"][: len(found[0])], found)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        source, target = Path(work, "model"), Path(work, "quantized")
        if {"layer", "modelopt"} <= set(args.skip):
            return
        bench.write(source)
        heads(["a layer", "seconds", "an expert"])
        for name in args.methods if "layer" not in args.skip else ():
            for gpus in args.gpus:
                bench.layer(source, target, name, bench.tokens[:1], gpus)  # kernels are compiled
                took, alone = bench.layer(source, target, name, bench.tokens, gpus)
                label = f"ours, {name}" + f", {gpus} GPUs" * (gpus > 1)
                row([label, f"{took:.1f}", f"{alone / args.experts:.3f}"])
        for recipe in peers.RECIPES if "modelopt" not in args.skip else ():
            try:
                took = bench.modelopt(source, recipe)
                label = f"ModelOpt {peers.modelopt_version(bench.device)}, {recipe}"
                row([label, f"{took:.1f}", f"{took / args.experts:.3f}"])
            except (peers.PeerError, ImportError) as error:
                row([f"ModelOpt, {recipe}: {error}", "-", "-"])


if __name__ == "__main__":
    main()
