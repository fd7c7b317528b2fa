"""How far NVFP4 experts are from bf16's, in one table: ours, ModelOpt's, llm-compressor's.

    python -m benchmarks.accuracy SOURCE [NVFP4_FOLDER ...] [--rules max mse] [--generation]
        [--modelopt] [--llm-compressor] [--rows 48] [--device cuda --dtype bfloat16]

SOURCE is the unquantized checkpoint, each NVFP4_FOLDER one made of it by anything, in ModelOpt's
or compressed-tensors' layout; for each of ``--rules`` the bench makes one itself. All are computed
by Transformers' own model of SOURCE, in which only the routed experts are replaced by what the
folder's files mean: **weights alone** (activations as they are: what Marlin, Humming and this
package's CPU kernel serve), and **with activations** rounded to NVFP4 as well, by a simulation
(``benchmarks.simulate``) that ``tests/benchmarks/test_simulate.py`` holds against vLLM's emulation;
``--input-scales fp8``: to E4M3, and the weights to what FP8 products can take of them.
ModelOpt's rows are its own fake quantization (``benchmarks.peers``).

* **KL**: mean over tokens of KL(bf16 || quantized), nats. It tells methods apart where perplexity
  is noise; after it, the standard error of the mean over rows.
* **perplexity**, over the same tokens.
* **top-1**: how often the most likely token is bf16's.
* with ``--generation`` (``benchmarks.generation``): tokens before greedy text leaves bf16's, of
  those written, and the share of brackets that are closed.

The text is Python's standard library, every third module of it (``examples.perplexity``), cut into
rows of 513 tokens; those that calibrate for a row of this table use the other two thirds. The row
"bf16" has under "with activations" unquantized weights and rounded inputs, with input scales of 1:
the share of the activations alone, with plain ranges.

SOURCE's logits stay in memory, rows x 512 x vocabulary x 4 bytes: 0.4 GB for 48 rows of m3-nano.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

# Read when torch loads OpenMP: threads that wait asleep, not spinning, are several times faster
# beside another busy process.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F

from benchmarks import generation, peers
from benchmarks.simulate import (
    BY_TOKEN,
    EIGHT_BITS,
    SCALES,
    own_experts,
    simulated,
    weights_in_e4m3,
)
from benchmarks.stored import read
from examples.perplexity import (
    Rows,
    context_length,
    cut,
    held_out_rows,
    standard_library,
    token_stream,
)
from quantize.checkpoint.reader import Checkpoint
from quantize.errors import QuantizeError
from quantize.execute import execute
from quantize.experts.identify import identify
from quantize.nvfp4.scales import RULES
from quantize.run.options import Options
from quantize.run.plan import plan

ROW = 513
"""Tokens a row, one more than are scored."""
BATCH = 4
"""Rows at a time."""


class Figures(NamedTuple):
    """What the bench says of one model; see the module's docstring.

    Attributes:
        error: standard error of ``kl``, from its spread over rows.
        agreement, closed: None without generation.
    """

    kl: float
    error: float
    perplexity: float
    top1: float
    agreement: float | None = None
    closed: float | None = None


class Row(NamedTuple):
    """A row of the table; ``why`` says why figures are missing."""

    label: str
    weights: Figures | None = None
    activations: Figures | None = None
    why: str = ""


class Bench:
    """The unquantized model, what it says of the text, and how far others are from that.

    Args:
        source: the unquantized checkpoint.
        rows: of held-out text.
        scales: of ``benchmarks.simulate.SCALES``.
        prompts: how many to go on from; 0 for no generation.
        tokens: to write after each.
    """

    def __init__(
        self,
        source: Path,
        rows: int,
        device: torch.device | str = "cpu",
        dtype: str = "float32",
        scales: str = SCALES[0],
        prompts: int = 0,
        tokens: int = 64,
    ) -> None:
        from transformers import AutoTokenizer

        self.source, self.scales, self.tokens = source, scales, tokens
        self.device, self.dtype = torch.device(device), getattr(torch, dtype)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.length = min(ROW, context_length(source) or ROW)
        self.rows: Rows = held_out_rows(self.tokenizer, rows, self.length)
        self.gates = identify(source)
        self.model = self.load()
        self.reference = [logits.float().cpu() for logits in self._logits(self.model)]
        _, held_out = standard_library()
        self.prompts = generation.find_prompts(self.tokenizer, held_out, prompts) if prompts else []
        self.written = generation.greedy(self.model, self.prompts, tokens) if prompts else None

    def load(self) -> Any:
        """The unquantized model; a new one, for peers that change it for good."""
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.source, dtype=self.dtype)
        # One expert's products after another's, as in the simulation and as ModelOpt demands;
        # grouped ones round otherwise in bf16, and some GPUs have them in bf16 only.
        model.set_experts_implementation("eager")
        return model.to(self.device).eval()

    def calibration(self, count: int) -> Rows:
        """``count`` rows of the standard library's other two thirds."""
        training, _ = standard_library()
        return list(islice(cut(token_stream(self.tokenizer, training), self.length), count))

    @torch.inference_mode()
    def figures(self, model: Any) -> Figures:
        """Compare ``model`` with the unquantized one."""
        divergence: list[float] = []
        loss, same, count = 0.0, 0, 0
        for logits, reference, batch in zip(
            self._logits(model), self.reference, self._batches(), strict=True
        ):
            truth = F.log_softmax(reference.to(self.device), dim=-1)
            found = F.log_softmax(logits.float(), dim=-1)
            divergence += (truth.exp() * (truth - found)).sum(-1).double().mean(-1).tolist()
            targets = batch[:, 1:, None].to(self.device)
            loss -= found.gather(-1, targets).double().sum().item()
            same += int((truth.argmax(-1) == found.argmax(-1)).sum())
            count += targets.numel()
        kl = torch.tensor(divergence, dtype=torch.float64)
        error = kl.std().item() / math.sqrt(len(kl)) if len(kl) > 1 else math.nan
        figures = Figures(kl.mean().item(), error, math.exp(loss / count), same / count)
        if self.written is None:
            return figures
        written = generation.greedy(model, self.prompts, self.tokens)
        return figures._replace(
            agreement=generation.agreement(written, self.written),
            closed=generation.closed(self.tokenizer, self.prompts, written),
        )

    def unquantized(self) -> Row:
        """The first row, see the module's docstring."""
        weights = self.figures(self.model)
        layers = own_experts(self.model, self.gates)
        with simulated(self.model, layers, self.gates, self.scales):
            return Row("bf16", weights, self.figures(self.model))

    def folder(self, label: str, folder: Path) -> Row:
        """A row for an NVFP4 folder. The gate is that of the folder's contract, if it has one."""
        try:
            layers, contract = read(folder)
            gates = contract or self.gates
            with simulated(self.model, layers, gates, None):
                weights = self.figures(self.model)
        except (QuantizeError, ValueError) as error:  # another model's; the table goes on
            return Row(label, why=str(error))
        if self.scales == EIGHT_BITS:
            layers, _ = read(folder, weights_in_e4m3)
        elif self.scales not in BY_TOKEN and any(e.input_scales is None for e in layers.values()):
            return Row(label, weights, why="no input scales: its activations stay as they are")
        with simulated(self.model, layers, gates, self.scales):
            return Row(label, weights, self.figures(self.model))

    def ours(self, recipe: str, target: Path) -> Row:
        """A row for what this package makes of SOURCE, by a key of ``RECIPES``."""
        with Checkpoint(self.source) as source:
            # With input scales, so that the table has figures with 4-bit activations.
            options = replace(RECIPES[recipe](self), activations=True)
            execute(source, plan(source, options), target)
        return self.folder(f"ours, {recipe}", target)

    def modelopt(self, recipe: str, calibration: Rows) -> Row:
        """A row for ModelOpt, by a key of ``peers.RECIPES``."""
        label = f"ModelOpt, {recipe}"
        try:
            label = f"ModelOpt {peers.modelopt_version(self.device)}, {recipe}"
            model = peers.modelopt(self.load(), recipe, calibration, BATCH)
        except peers.PeerError as error:
            return Row(label, why=str(error))
        activations = self.figures(model)
        peers.without_inputs(model)
        return Row(label, self.figures(model), activations)

    def llm_compressor(self, method: str, calibration: Rows, target: Path, work: Path) -> Row:
        """A row for llm-compressor, by one of ``peers.LLM_COMPRESSOR``."""
        label = f"llm-compressor {peers.LLM_COMPRESSOR_VERSION}, {method}"
        try:
            peers.llm_compressor(self.source, target, method, calibration, work)
        except peers.PeerError as error:
            return Row(label, why=str(error))
        return self.folder(label, target)

    def _batches(self) -> Iterator[torch.Tensor]:
        yield from torch.tensor(self.rows).split(BATCH)

    @torch.inference_mode()
    def _logits(self, model: Any) -> Iterator[torch.Tensor]:
        for batch in self._batches():
            yield model(input_ids=batch[:, :-1].to(self.device), use_cache=False).logits


Recipe = Callable[[Bench], Options]

RECIPES: dict[str, Recipe] = {rule: lambda _, rule=rule: Options(scales=rule) for rule in RULES}  # type: ignore[misc]
"""What the bench makes of SOURCE itself. A recipe that calibrates is one more entry: its text comes
from ``Bench.calibration``."""


def table(rows: Sequence[Row], tokens: int | None) -> str:
    """The table in Markdown.

    Args:
        tokens: written after each prompt; None without generation.
    """
    names = ["KL, nats", "perplexity", "top-1"]
    if tokens is not None:
        names += [f"same text, of {tokens}", "closed"]
    columns = [f"{what}: {name}" for what in ("weights", "with activations") for name in names]
    lines = ["| | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 1)]
    for row in rows:
        cells = [*_cells(row.weights, len(names)), *_cells(row.activations, len(names))]
        lines.append(f"| {row.label} | " + " | ".join(cells) + " |")
    absent = [f"- {row.label}: {row.why}" for row in rows if row.why]
    return "\n".join([*lines, "", *absent] if absent else lines)


def _cells(figures: Figures | None, count: int) -> list[str]:
    if figures is None:
        return ["\N{EN DASH}"] * count
    cells = [
        f"{figures.kl:.5f} ± {figures.error:.5f}",
        f"{figures.perplexity:.4f}",
        f"{figures.top1:.2%}",
    ]
    if figures.agreement is not None and figures.closed is not None:
        cells += [f"{figures.agreement:.1f}", f"{figures.closed:.1%}"]
    return cells


def _rows(bench: Bench, args: argparse.Namespace, work: Path) -> Iterator[Row]:
    yield bench.unquantized()
    for recipe in args.rules:
        yield bench.ours(recipe, work / f"ours-{recipe}")
    for folder in args.folders:
        yield bench.folder(folder.name, folder)
    if args.modelopt or args.llm_compressor:
        calibration = bench.calibration(args.calibration_rows)
    if args.modelopt:
        for recipe in peers.RECIPES:
            yield bench.modelopt(recipe, calibration)
    if args.llm_compressor:
        for method in peers.LLM_COMPRESSOR:
            target = work / f"llm-compressor-{method}"
            yield bench.llm_compressor(method, calibration, target, args.work)


def main() -> None:
    """Parse the arguments, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("folders", type=Path, nargs="*", metavar="NVFP4_FOLDER")
    parser.add_argument("--rules", nargs="*", default=[*RECIPES], choices=[*RECIPES], help="ours")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--input-scales", default=SCALES[0], choices=SCALES, help="see benchmarks.simulate"
    )
    parser.add_argument("--generation", action="store_true")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64, help="written after each prompt")
    parser.add_argument("--modelopt", action="store_true", help=f"needs {peers.MODELOPT}")
    parser.add_argument("--llm-compressor", action="store_true", help="installs it under --work")
    parser.add_argument("--calibration-rows", type=int, default=64, help="for those two")
    parser.add_argument("--work", type=Path, default=Path("/tmp/nvfp4-moe-speed"), metavar="DIR")
    args = parser.parse_args()

    bench = Bench(
        args.source,
        args.rows,
        args.device,
        args.dtype,
        args.input_scales,
        args.prompts if args.generation else 0,
        args.tokens,
    )
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="nvfp4-moe-accuracy-") as temporary:
        started = time.perf_counter()
        for row in _rows(bench, args, Path(temporary)):
            # The figures too: a run that is cut short has not measured for nothing.
            found = "; ".join(", ".join(_cells(f, 3)) for f in row[1:3] if f is not None)
            seconds = time.perf_counter() - started
            print(f"{row.label}: {found or row.why} ({seconds:.0f} s)", file=sys.stderr)
            rows.append(row)
            started = time.perf_counter()
    print(table(rows, args.tokens if args.generation else None))
    print(
        f"\n{args.source}: {len(bench.rows)} rows of {bench.length} tokens, {len(bench.prompts)} "
        f"prompts, input scales: {args.input_scales}; {args.dtype} on {_device(bench.device)}, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


if __name__ == "__main__":
    main()
