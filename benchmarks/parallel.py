"""The perplexity of one checkpoint on one GPU and on two, split in each way that vLLM has.

    python -m benchmarks.parallel NVFP4_FOLDER [--transformers NVFP4_FOLDER] [--all-args '...']

Each way is a ``vllm serve`` of its own, asked for the log-probabilities of held-out Python:

* ``tp2``: tensor parallel; ``ep2``: the same with whole experts on each rank;
* ``dp2-ep2``: two copies of attention, experts divided; requests go to both;
* ``eplb``: ``dp2-ep2`` with two redundant experts, balanced anew every ``STEP`` steps, asked three
  times so that experts move in between.

vLLM 0.32's own MiniMax-M3 model has no EPLB: it would be switched on, and nothing would happen. So
``one`` and ``eplb`` are also run on a second folder (``--transformers``: the Transformers layout,
or a Qwen3-MoE), whose vLLM model has it; ``qwen3`` writes a small random one.

``--at-once`` starts all of them beside each other, for where time on GPUs is short: no figure here
is a speed.

``--as-nodes`` starts each rank the way vLLM is started on a machine of its own (:func:`nodes`), for
which this machine's first GPU is enough: both ranks share it, and talk through sockets.

Printed: a ``RESULT {json}`` line for each, then what is wrong: a perplexity more than ``BOUND`` off
that of one GPU and the same folder, tokens' scores more than ``APART`` off, or EPLB that moved
nothing. Exit code 1 if anything is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import shlex
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from examples import server
from examples.perplexity import held_out_rows

NAME = "model"
BOUND = 2e-3
"""Relative. Sums over ranks round otherwise; the same engine started again differs by 3e-4."""

APART = 0.2
"""Of scores, see :func:`compare`. Unrelated scores are 1.4 apart; two CPU ranks with the random
model 0.08 in bfloat16, and all but nothing in float32 (``tests/engine/test_engine.py``)."""

RANDOM = "random-qwen3"

STEP = 8
EPLB = {
    "window_size": STEP,
    "step_interval": STEP,
    "num_redundant_experts": 2,
    # In step with the forward passes, so that it is known when experts have moved.
    "use_async": False,
    "communicator": "torch_nccl",
}
_DP = ("--data-parallel-size", "2", "--enable-expert-parallel")
_TP = ("--tensor-parallel-size", "2")
_BALANCED = ("--enable-eplb", "--eplb-config", json.dumps(EPLB))


@dataclass(frozen=True)
class Way:
    """How a model is split.

    Attributes:
        asked: how often the rows are.
    """

    options: tuple[str, ...] = ()
    asked: int = 1
    eplb: bool = False


WAYS = {
    "one": Way(),
    "tp2": Way(_TP),
    "ep2": Way((*_TP, "--enable-expert-parallel")),
    "dp2-ep2": Way(_DP),
    "eplb": Way((*_DP, *_BALANCED), 3, True),
    "ep2-eplb": Way((*_TP, "--enable-expert-parallel", *_BALANCED), 3, True),
}
PLAIN = ("one", "tp2", "ep2", "dp2-ep2")

NODE = {
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_NET": "Socket",
    "NCCL_MNNVL_ENABLE": "0",
    "NCCL_NVLS_ENABLE": "0",
    # vLLM tells ranks of one machine by shared memory, which these do share, and would try sums
    # that reach into the other GPU's memory: here the same GPU.
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}
"""What ``--as-nodes`` sets: two machines' ranks, on one machine."""

console = Console(highlight=False, soft_wrap=True, stderr=True)


def qwen3(folder: Path, tokenizer: Path) -> Path:
    """A random Qwen3-MoE without shared experts, quantized; sizes that all kernels take.

    Args:
        tokenizer: m3-nano's folder.
    """
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from quantize.checkpoint.reader import Checkpoint
    from quantize.execute import execute
    from quantize.run.plan import plan

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=256, norm_topk_prob=True,
        max_position_embeddings=2048, initializer_range=0.1,
    )  # fmt: skip
    source = folder / "bf16"
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, source / name)
    with Checkpoint(source) as checkpoint:
        execute(checkpoint, plan(checkpoint), folder / RANDOM, overwrite=True)
    return folder / RANDOM


def scores(url: str, rows: Any) -> list[float]:
    """Log-probability of each token of ``rows`` but their first, in nats."""

    def one(row: list[int]) -> list[float]:
        body = {"model": NAME, "prompt": row, "max_tokens": 1, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/completions",
            json.dumps(body | {"prompt_logprobs": 0}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            found = json.load(reply)["choices"][0]["prompt_logprobs"]
        return [found[place][str(token)]["logprob"] for place, token in enumerate(row) if place]

    # Several at once: one alone would always go to the first of two data-parallel ranks.
    with ThreadPoolExecutor(4) as pool:
        return [value for values in pool.map(one, rows) for value in values]


def nodes(options: Sequence[str]) -> list[list[str]]:
    """The options of ``vllm serve`` on two machines, the first of which answers requests.

    Whatever concerns the model must be said on both: each builds its own configuration of it.
    """
    here, port = "127.0.0.1", str(server.free_port())  # of the first machine
    both = [*options, "--disable-custom-all-reduce"]  # why: see NODE
    if "--data-parallel-size" in options:
        both += ["--data-parallel-size-local", "1"]
        both += ["--data-parallel-address", here, "--data-parallel-rpc-port", port]
        return [both, [*both, "--data-parallel-start-rank", "1", "--headless"]]
    both += ["--nnodes", "2", "--master-addr", here, "--master-port", port]
    return [[*both, "--node-rank", "0"], [*both, "--node-rank", "1", "--headless"]]


def measure(
    folder: Path, way: str, args: argparse.Namespace, rows: Any, variables: Mapping[str, str]
) -> dict[str, Any]:
    """Scores and perplexity of each time the rows were asked; how often experts were moved."""
    options = [
        "--quantization", args.quantization, "--served-model-name", NAME,
        "--max-model-len", "1024", "--max-num-seqs", "16", "--no-enable-prefix-caching",
        *shlex.split(args.all_args), *WAYS[way].options,
    ]  # fmt: skip
    log = args.logs / f"{folder.name}-{way}.log"
    others = []
    port = server.free_port()
    begin = time.monotonic()
    with contextlib.ExitStack() as stack:
        if args.as_nodes and WAYS[way].options:
            options, headless = nodes(options)
            # NCCL refuses two ranks on one GPU only if both name the same host.
            variables = NODE | dict(variables) | {"NCCL_HOSTID": "node-0"}
            other = log.with_name(f"{log.stem}-node1.log")
            second = stack.enter_context(  # before the first: stopped after it
                server.started(
                    folder, headless, port=server.free_port(), log=other, console=console,
                    variables=variables | {"NCCL_HOSTID": "node-1"},
                )
            )  # fmt: skip
            others.append((second, other))
        elif "--data-parallel-size" in options:
            # Not two runs' default.
            options += ["--data-parallel-rpc-port", str(server.free_port())]
        process = stack.enter_context(
            server.started(
                folder, options, port=port, log=log, console=console, variables=variables
            )
        )
        server.await_health(process, port, log, console, args.limit, others)
        started = time.monotonic() - begin
        url = f"http://127.0.0.1:{port}/v1"
        found = [scores(url, rows) for _ in range(WAYS[way].asked)]
    text = log.read_text(errors="replace")
    kernel = re.findall(r"NVFP4 experts: .*?; kernel (\w+)", text)
    return {
        "folder": folder.name,
        "way": way,
        "perplexities": [round(math.exp(-statistics.fmean(values)), 4) for values in found],
        "scores": found,
        "kernel": kernel[0] if kernel else None,
        # Also said of the start's profiling, and of a rearrangement that was not worth it.
        "rearranged": len(re.findall(r"Rearranged experts\s+in", text))
        - text.count("Skip rearrange"),
        "start_seconds": round(started, 1),
    }


def compare(line: dict[str, Any], single: dict[str, Any]) -> list[float]:
    """For each time the rows were asked: root mean square of the scores' differences from one
    GPU's, over the standard deviation of the latter."""
    truth = single["scores"][0]
    spread = statistics.pstdev(truth)
    return [
        math.sqrt(statistics.fmean((x - y) ** 2 for x, y in zip(values, truth, strict=True)))
        / spread
        for values in line["scores"]
    ]


def judge(line: dict[str, Any], single: dict[str, Any] | None) -> list[str]:
    """Print ``line`` beside one GPU's; what is wrong."""
    name = f"{line['folder']}, {line['way']}"
    shown = {key: value for key, value in line.items() if key != "scores"}
    if single is None:
        print("RESULT " + json.dumps(shown), flush=True)
        return [f"{name}: there is no figure of one GPU"]
    apart = compare(line, single)
    truth = single["perplexities"][0]
    print("RESULT " + json.dumps(shown | {"apart": apart}), flush=True)
    problems = [f"{name}: scores are {a:.3f} apart" for a in apart if not a <= APART]
    # A random model's perplexity says nothing, and its large logits make it noisy.
    if line["folder"] != RANDOM:
        problems += [
            f"{name}: perplexity {value}, on one GPU {truth}"
            for value in line["perplexities"]
            if not abs(value / truth - 1) <= BOUND
        ]
    if WAYS[line["way"]].eplb and line["rearranged"] <= 0:
        problems.append(f"{name}: no expert was moved")
    return problems


def main() -> None:
    """Parse the arguments, serve in each way, print and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(PLAIN))
    parser.add_argument("--transformers", type=Path, help="folder for --eplb-ways")
    parser.add_argument("--eplb-ways", nargs="*", choices=WAYS, default=["one", "eplb"])
    parser.add_argument("--qwen3", type=Path, help="write a Qwen3-MoE here, split it in all ways")
    parser.add_argument("--qwen3-ways", nargs="*", choices=WAYS, default=["one", "tp2", "ep2-eplb"])
    parser.add_argument("--quantization", default="nvfp4_moe")
    parser.add_argument("--rows", type=int, default=12, help="of 513 tokens")
    parser.add_argument("--all-args", default="", help="further options of vllm serve")
    parser.add_argument("--limit", type=float, default=240, help="seconds to start in")
    parser.add_argument("--at-once", action="store_true", help="all servers beside each other")
    parser.add_argument("--as-nodes", action="store_true", help="two ranks as on two machines")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    args.logs = args.logs or Path(tempfile.mkdtemp(prefix="parallel-"))
    args.logs.mkdir(parents=True, exist_ok=True)
    rows = held_out_rows(AutoTokenizer.from_pretrained(args.folder), args.rows)
    wanted = [(args.folder, way) for way in args.ways]
    if args.transformers:
        wanted += [(args.transformers, way) for way in args.eplb_ways]
    if args.qwen3:
        made = qwen3(args.qwen3, args.folder)
        wanted += [(made, way) for way in args.qwen3_ways]
    # On CPUs every rank would else bind to the same cores, and refuse. An entry for each of a node.
    cores = "0" if args.as_nodes else "0|0"
    bind = {} if torch.cuda.is_available() else {"VLLM_CPU_OMP_THREADS_BIND": cores}

    def attempt(case: tuple[Path, str]) -> dict[str, Any] | Exception:
        folder, way = case
        try:
            return measure(folder, way, args, rows, bind if way != "one" else {})
        except Exception as error:  # one way's failure must not hide what the others give
            return error

    problems = []
    single: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(max(1, len(wanted))) as pool:
        # One after another in this thread, so that Ctrl-C reaches the server that is up.
        outcomes = pool.map(attempt, wanted) if args.at_once else map(attempt, wanted)
        for (folder, way), found in zip(wanted, outcomes, strict=True):
            if isinstance(found, Exception):
                problem = f"{folder.name}, {way}: {type(found).__name__}: {str(found)[-3000:]}"
                problems.append(problem)
                print("WRONG " + problem, flush=True)
                continue
            if way == "one":
                single[folder.name] = found
            problems += judge(found, single.get(folder.name))
    print("\n".join(f"WRONG {text}" for text in problems) or "VERDICT as on one GPU")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
