"""Serving speed: ours beside stock vLLM's NVFP4 and bf16, one machine, one run.

    python -m benchmarks.serve NVFP4 [--bf16 FOLDER|dummy] [--rounds 2] [--keep-running]

``vllm bench serve`` (its own code, in this process, so that its imports are paid once) asks servers
that are started here:

* ``ours``: NVFP4 with ``--quantization nvfp4_moe``;
* ``ours-fp8``: the same with ``NVFP4_MOE_ACTIVATIONS=fp8`` (not among the default ``--variants``);
* ``stock``: NVFP4 without the plugin (``VLLM_PLUGINS=``), with ``--quantization modelopt_fp4``
  (or ``compressed-tensors``, if that is the layout);
* ``bf16``: the folder given, or with ``dummy`` NVFP4's config without its quantization and weights
  made up by vLLM (``--load-format dummy``).

Only one server is asked at a time. Each round asks every variant at every concurrency; every other
round goes through the variants backwards, so that drift meets all alike. With ``--keep-running``
all servers are up together and variants alternate at each concurrency; without, a variant's server
starts anew each round. Prompts are random tokens, the same for each variant; prefix caching is off.
A server that does not start is left out, and the exit code is then 1.

Printed: a ``RESULT {json}`` line a run as soon as it has ended, then one table of medians over
rounds, and whether ours is slower than stock. ``--budget`` ends with what there is by then.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape

from benchmarks.serving_table import BenchmarkError, Run, table, verdicts
from examples import server

OURS, FP8, STOCK, BF16 = "ours", "ours-fp8", "stock", "bf16"
NAME = "model"
WARM_OUTPUT = 8

console = Console(highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Variant:
    """How one server is started.

    ``quantization`` is what its log must say: without the plugin, vLLM 0.32 takes a ModelOpt folder
    asked for with ``--quantization nvfp4_moe`` as ``modelopt_fp4``, and says nothing. So it must of
    ``kernel``, where another may step in.
    """

    name: str
    folder: Path
    quantization: str
    options: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()
    kernel: str = ""

    def environment(self) -> dict[str, str]:
        """``variables``, and that the log says what :meth:`check` looks for, whatever the user's
        shell asks vLLM to say."""
        return {**dict(self.variables), "VLLM_LOGGING_LEVEL": "INFO"}

    def check(self, log: Path) -> None:
        """Raises BenchmarkError if the log is not that of a server of this variant."""
        said = re.search(r"quantization=([^,]*),", log.read_text(errors="replace"))
        if said is None or said[1] != self.quantization:
            found = said[1] if said else "nothing"
            raise BenchmarkError(
                f"{self.name}: {log} says quantization={found}, not {self.quantization}: is the "
                "plugin installed for this Python (entry point vllm.general_plugins)?"
            )
        if self.kernel and f"kernel {self.kernel}" not in log.read_text(errors="replace"):
            raise BenchmarkError(f"{self.name}: {log} does not say `kernel {self.kernel}`")


@dataclass(frozen=True)
class Load:
    """What is asked of each server."""

    concurrencies: tuple[int, ...]
    input_len: int
    output_len: int
    waves: int
    least: int

    def requests(self, concurrency: int) -> int:
        """``waves`` for each place, and not fewer than ``least``."""
        return max(self.least, self.waves * concurrency)


class Ask(Protocol):
    """``vllm bench serve`` with these options; its result."""

    def __call__(self, options: Sequence[str]) -> dict[str, Any]: ...


def variants(args: argparse.Namespace) -> list[Variant]:
    """Those asked for, with the options of all and their own."""
    longest = args.input_len + args.output_len + 16
    common = ["--served-model-name", NAME, "--no-enable-prefix-caching"]
    common += ["--max-model-len", str(longest), "--max-num-seqs", str(max(args.concurrency))]
    if args.kv_gib:
        common += ["--kv-cache-memory-bytes", str(int(args.kv_gib * 2**30))]
    if args.keep_running:
        # With a KV cache of given size, only a check that so much is free when a server starts.
        common += ["--gpu-memory-utilization", f"{0.9 / len(args.variants):.2f}"]
    common += shlex.split(args.all_args)
    config = json.loads((args.nvfp4 / "config.json").read_text())
    modelopt = config["quantization_config"]["quant_method"] == "modelopt"
    bare = (("VLLM_PLUGINS", ""),)
    made = []
    for name in args.variants:
        if name in (OURS, FP8):
            options = [*common, "--quantization", "nvfp4_moe", *shlex.split(args.ours_args)]
            variables = (("NVFP4_MOE_ACTIVATIONS", "fp8" if name == FP8 else "bf16"),)
            kernel = "HOPPER FP8" if name == FP8 else ""
            made.append(Variant(name, args.nvfp4, "nvfp4_moe", tuple(options), variables, kernel))
        elif name == STOCK:
            method = "modelopt_fp4" if modelopt else "compressed-tensors"
            options = [*common, "--quantization", method, *shlex.split(args.stock_args)]
            made.append(Variant(name, args.nvfp4, method, tuple(options), bare))
        else:
            dummy = args.bf16 == "dummy"
            folder = hollow(args.nvfp4, args.results / "bf16") if dummy else Path(args.bf16)
            options = [*common, *(["--load-format", "dummy"] if dummy else [])]
            options += shlex.split(args.bf16_args)
            made.append(Variant(name, folder, "None", tuple(options), bare))
    return made


def hollow(source: Path, target: Path) -> Path:
    """The model of ``source`` without weights and quantization: its config and its tokenizer."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".jinja") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)
    for name in ("hf_quant_config.json", "recipe.yaml"):
        (target / name).unlink(missing_ok=True)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target


@contextlib.contextmanager
def running(wanted: Sequence[Variant], results: Path, limit: float) -> Iterator[dict[str, int]]:
    """Starts all ``wanted`` servers together; yields the ports of those that came up."""
    with contextlib.ExitStack() as stack:
        processes = []
        for variant in wanted:
            port, log = server.free_port(), results / f"server-{variant.name}.log"
            process = stack.enter_context(
                server.started(
                    variant.folder,
                    variant.options,
                    port=port,
                    log=log,
                    console=console,
                    variables=variant.environment(),
                )
            )
            processes.append((variant, process, port, log))
        ports = {}
        for variant, process, port, log in processes:
            name = variant.name
            start = time.monotonic()
            try:
                server.await_health(process, port, log, console, limit)
            except server.ServerError as error:
                why = str(error).splitlines()[0].rstrip(":")
                console.print(f"{name}: left out, {why}: {first_error(log)} (see {log})")
                continue
            variant.check(log)
            console.print(f"{name}: ready after {time.monotonic() - start:.0f} s more")
            ports[name] = port
        yield ports


def first_error(log: Path) -> str:
    """The first exception in a server's log, from which those at its end followed."""
    found = re.search(
        r"^(?:.* ERROR .*\] )?(\w+(?:Error|Exception): .*)", log.read_text(errors="replace"), re.M
    )
    return escape(found[1]) if found else "no exception in its log"


def bench_serve(results: Path) -> Ask:
    """``vllm bench serve`` of the vLLM that is installed; its output goes to ``bench.log``.

    Raises:
        BenchmarkError: if it cannot be imported.
    """
    try:
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError as error:
        raise BenchmarkError(
            f"`vllm bench serve` cannot be imported: {error}. What it needs beside vLLM itself "
            "comes with: pip install 'vllm[bench]'"
        ) from error

    def ask(options: Sequence[str]) -> dict[str, Any]:
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        with (results / "bench.log").open("a") as log, contextlib.redirect_stdout(log):
            return main(parser.parse_args(list(options)))

    return ask


def bench_options(
    args: argparse.Namespace, port: int, concurrency: int, requests: int, output_len: int
) -> list[str]:
    """For ``vllm bench serve``."""
    return [
        *("--backend", "openai", "--base-url", f"http://127.0.0.1:{port}", "--model", NAME),
        *("--tokenizer", str(args.tokenizer or args.nvfp4)),
        *("--dataset-name", "random", "--random-input-len", str(args.input_len)),
        *("--random-output-len", str(output_len), "--ignore-eos", "--temperature", "0"),
        *("--num-prompts", str(requests), "--max-concurrency", str(concurrency)),
        *("--seed", "0", "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99"),
        "--disable-tqdm",
    ]


def warm(ask: Ask, args: argparse.Namespace, port: int) -> None:
    """Short answers at each concurrency: kernels are compiled and tuned for their batches."""
    for concurrency in args.concurrency:
        ask(bench_options(args, port, concurrency, concurrency, WARM_OUTPUT))


def measure(
    ask: Ask, args: argparse.Namespace, load: Load, variant: str, port: int, concurrency: int,
    round_: int,
) -> Run:  # fmt: skip
    """One run; vLLM's JSON is left in the results' folder."""
    requests = load.requests(concurrency)
    options = bench_options(args, port, concurrency, requests, load.output_len)
    options += ["--save-result", "--result-dir", str(args.results), "--result-filename"]
    options += [f"{variant}-c{concurrency}-r{round_}.json"]
    if round_ == 1:
        console.print(f"[dim]vllm bench serve {shlex.join(options)}[/]")
    run = Run.of(variant, round_, ask(options), requests, load.output_len)
    console.print("RESULT " + json.dumps(run.line()), markup=False)
    return run


class Clock:
    """Time since the start, and what is left of the budget."""

    def __init__(self, budget: float | None) -> None:
        self.start = time.monotonic()
        self.budget = budget

    @property
    def spent(self) -> float:
        return time.monotonic() - self.start

    def allows(self, seconds: float) -> bool:
        return self.budget is None or self.spent + seconds <= self.budget


def plan(args: argparse.Namespace) -> list[tuple[int, int | None, list[str]]]:
    """What is done in which order: round, concurrency (None: all of them), variants."""
    steps: list[tuple[int, int | None, list[str]]] = []
    for number in range(1, args.rounds + 1):
        order = args.variants if number % 2 else args.variants[::-1]
        if args.keep_running:
            steps += [(number, concurrency, order) for concurrency in args.concurrency]
        else:
            steps += [(number, None, [name]) for name in order]
    return steps


def expected(args: argparse.Namespace, load: Load) -> float:
    """Seconds for all of it, if a start and a token take what the options say."""
    starts = 1 if args.keep_running else args.rounds * len(args.variants)
    tpot, ttft = args.expect_tpot / 1000, 0.5
    waves = sum(-(-load.requests(c) // c) for c in load.concurrencies)
    runs = args.rounds * len(args.variants) * waves * (ttft + load.output_len * tpot)
    warming = len(args.variants) * len(load.concurrencies) * (2 * ttft + WARM_OUTPUT * tpot)
    warming *= 1 if args.keep_running else args.rounds
    return starts * args.expect_start + runs + warming


def benchmark(args: argparse.Namespace, runs: list[Run]) -> None:
    """Adds to ``runs`` as they end; all of them, or those that the budget had time for."""
    load = Load(tuple(args.concurrency), args.input_len, args.output_len, args.waves, args.least)
    clock = Clock(args.budget)
    wanted = {variant.name: variant for variant in variants(args)}
    console.print(
        f"{', '.join(wanted)}: {args.rounds} round(s) at concurrency {args.concurrency} with "
        f"{[load.requests(c) for c in args.concurrency]} requests of {args.input_len} tokens in "
        f"and {args.output_len} out. About {expected(args, load):.0f} s, if a server starts in "
        f"{args.expect_start:.0f} s and a token takes {args.expect_tpot:.0f} ms"
    )
    with contextlib.ExitStack() as stack:
        ports: dict[str, int] = {}
        if args.keep_running:
            entered = running(list(wanted.values()), args.results, args.start_limit)
            ports = stack.enter_context(entered)
        ask = bench_serve(args.results)
        for port in ports.values():
            warm(ask, args, port)
        longest = 0.0
        for number, concurrency, order in plan(args):
            if not clock.allows(longest):
                console.print(f"budget: stopping after {clock.spent:.0f} s, in round {number}")
                break
            began = clock.spent
            if concurrency is not None:
                for name in filter(ports.get, order):
                    runs += [measure(ask, args, load, name, ports[name], concurrency, number)]
            else:
                with running([wanted[order[0]]], args.results, args.start_limit) as here:
                    for name, port in here.items():
                        warm(ask, args, port)
                        for c in args.concurrency:
                            runs += [measure(ask, args, load, name, port, c, number)]
            longest = max(longest, clock.spent - began)
    console.print(f"took {clock.spent:.0f} s")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("nvfp4", metavar="NVFP4", type=Path, help="a quantized folder")
    add("--bf16", default="dummy", help="a folder, or dummy (default)")
    add("--variants", nargs="+", default=[OURS, STOCK, BF16], choices=[OURS, FP8, STOCK, BF16])
    add("--concurrency", nargs="+", type=int, default=[1, 16, 128])
    add("--input-len", type=int, default=512)
    add("--output-len", type=int, default=128)
    add("--waves", type=int, default=3, help="requests for each place")
    add("--least", type=int, default=4, help="requests in a run, at least")
    add("--rounds", type=int, default=2)
    add("--keep-running", action="store_true", help="all servers at once, if memory allows")
    add("--kv-gib", type=float, default=4.0, help="KV cache of each server; 0: vLLM's choice")
    hint = "options of `vllm serve`, with an equals sign: --all-args='--enforce-eager'"
    add("--all-args", default="", metavar="OPTIONS", help=f"for all servers: {hint}")
    for name in (OURS, STOCK, BF16):
        add(f"--{name}-args", default="", metavar="OPTIONS", help="for this variant's server")
    add("--tokenizer", type=Path, help="default: NVFP4")
    add("--results", type=Path, default=Path("serve-results"), help="for logs and vLLM's JSON")
    add("--start-limit", type=float, default=600, help="seconds for a server to start")
    add("--budget", type=float, help="seconds after which nothing new is begun")
    add("--expect-start", type=float, default=90, help="for the estimate, seconds")
    add("--expect-tpot", type=float, default=15, help="for the estimate, milliseconds")
    return made


def main() -> None:
    """Parse the arguments and print what was measured."""
    args = parser().parse_args()
    args.results = args.results.resolve()
    args.results.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # So that being told to end unwinds like Ctrl-C does, and takes the servers along.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    runs: list[Run] = []
    try:
        benchmark(args, runs)
    except (BenchmarkError, server.ServerError) as error:
        raise SystemExit(str(error)) from None
    finally:
        console.print(table(runs), markup=False)
        for verdict in verdicts(runs, OURS, STOCK):
            console.print(str(verdict), markup=False)
    if {run.variant for run in runs} != set(args.variants):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
