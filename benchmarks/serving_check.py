"""Whether a server's greedy answers depend on anything but the prompt.

    python -m benchmarks.serving_check NVFP4_FOLDER [--requests 256] [--at-once] [--all-args '...']

Each request is first answered alone by a server without graphs, compilation and prefix caching.
Then by servers with graphs on: alone; all requests at once; while as many others are aborted in
mid-stream; with prefix caching, cold and warm; with prompts prefilled in small chunks; and after a
restart. An answer must be the lone one's, token by token, or leave it where the two candidates'
log-probabilities differ by no more than ``BOUND`` in both runs. Perplexities, eager and with
graphs, must agree within ``PERPLEXITY``.

Printed: a ``RESULT {json}`` line for each comparison, then what is wrong; exit code 1 if anything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from examples import server
from examples.perplexity import cut, server_perplexity, standard_library, token_stream

NAME = "model"
CONTEXT = 1024
SHARED = 300
"""Tokens with which each fourth prompt begins: more than two blocks of any cache."""

BOUND = 1.0
"""Logits are bfloat16: from 8 to 16 they are 1/16 apart, and the roundings before them add up to a
few of those steps, or send a token to another expert. On an H200, of 256 requests asked in seven
ways, one had a gap of 0.625 and all others 0.25 at most. Tokens of another request would be several
nats off."""

PERPLEXITY = 2e-3
"""Relative. Engines started again differ by 3e-4 over 48 rows (docs/evidence/engine.md), and six
rows are an eighth of the tokens."""

console = Console(highlight=False, soft_wrap=True, stderr=True)


class Token(NamedTuple):
    """One generated token.

    Attributes:
        tops: log-probabilities, in nats, of the most likely tokens and this one.
    """

    id: int
    tops: dict[int, float]


Answer = list[Token]


@dataclass
class Comparison:
    """How answers differ from the lone ones.

    Attributes:
        different: requests whose tokens differ somewhere.
        gap: largest difference of the two candidates' log-probabilities where an answer leaves the
            lone one; infinite if either is not among the other's most likely.
        shift: largest change of a token's log-probability before that.
    """

    requests: int = 0
    different: int = 0
    gap: float = 0.0
    shift: float = 0.0
    problems: list[str] = field(default_factory=list)


def compare(lone: Sequence[Answer], found: Sequence[Answer], tokens: int) -> Comparison:
    """Answers to the same prompts, each ``tokens`` long."""
    result = Comparison(len(found))
    for number, (a, b) in enumerate(zip(lone, found, strict=True)):
        if len(a) != tokens or len(b) != tokens:
            result.problems.append(f"request {number}: {len(b)} tokens, alone {len(a)}")
            continue
        for place, (x, y) in enumerate(zip(a, b, strict=True)):
            if x.id == y.id:
                result.shift = max(result.shift, abs(x.tops[x.id] - y.tops[y.id]))
                continue
            result.different += 1
            gaps = [
                one.tops[one.id] - one.tops.get(other.id, -float("inf"))
                for one, other in ((x, y), (y, x))
            ]
            result.gap = max(result.gap, *gaps)
            if max(gaps) > BOUND:
                result.problems.append(
                    f"request {number}, token {place}: {x.id} alone, now {y.id}, and their "
                    f"log-probabilities differ by {gaps[0]:.3f} and {gaps[1]:.3f}"
                )
            break
    return result


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Different pieces of held-out Python, 8 to 390 tokens; each fourth after the same ``SHARED``
    tokens."""
    stream = token_stream(tokenizer, standard_library()[1])
    pieces = cut(stream, 390)
    shared = next(pieces)[:SHARED]
    made = []
    for number in range(count):
        piece = next(pieces)[: 8 + number * 149 % 383]
        made.append(shared + piece if number % 4 == 0 else piece)
    return made


class Client:
    """Asks one server.

    Args:
        url: of the API, ``.../v1``.
        tokens: to generate for each prompt.
    """

    def __init__(self, url: str, tokens: int, name: str = NAME) -> None:
        self.url = url
        self.tokens = tokens
        self.name = name

    def _open(self, prompt: list[int], **more: Any) -> Any:
        body: dict[str, Any] = {
            "model": self.name, "prompt": prompt, "max_tokens": self.tokens, "temperature": 0,
            "ignore_eos": True, **more,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self.url}/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        return urllib.request.urlopen(request, timeout=600)

    def answer(self, prompt: list[int]) -> Answer:
        """The greedy continuation."""
        # Without the option, two tokens of the same text would be one entry of the table.
        with self._open(prompt, logprobs=5, return_tokens_as_token_ids=True) as reply:
            found = json.load(reply)["choices"][0]["logprobs"]

        def number(name: str) -> int:
            return int(name.removeprefix("token_id:"))

        return [
            Token(number(token), {number(name): value for name, value in tops.items()})
            for token, tops in zip(found["tokens"], found["top_logprobs"], strict=True)
        ]

    def abort(self, prompt: list[int], after: int = 3) -> None:
        """Ask for a long stream, close it after a few pieces."""
        with self._open(prompt, stream=True, max_tokens=CONTEXT - len(prompt) - 1) as reply:
            for _ in range(2 * after):  # each piece is followed by an empty line
                assert reply.readline()

    def alone(self, asked: Sequence[list[int]]) -> list[Answer]:
        """One after the other."""
        return [self.answer(prompt) for prompt in asked]

    def together(self, asked: Sequence[list[int]]) -> list[Answer]:
        """All at once."""
        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(self.answer, asked))

    def amid_aborts(self, asked: Sequence[list[int]]) -> list[Answer]:
        """All at once, among as many requests whose clients go away."""
        with ThreadPoolExecutor(2 * len(asked)) as pool:
            leaving = [pool.submit(self.abort, prompt) for prompt in asked]
            answers = list(pool.map(self.answer, asked))
            for future in leaving:
                future.result()
        end = time.monotonic() + 30
        while running := self.metric("vllm:num_requests_running"):
            if time.monotonic() > end:
                raise AssertionError(f"{running:.0f} requests still run 30 s after all were done")
            time.sleep(0.2)
        return answers

    def metric(self, name: str) -> float:
        """Sum over labels of one of the server's metrics, 0 if it has none of that name."""
        with urllib.request.urlopen(f"{self.url.removesuffix('/v1')}/metrics", timeout=60) as reply:
            lines = reply.read().decode().splitlines()
        return sum(float(x.split()[-1]) for x in lines if x.startswith((f"{name}{{", f"{name} ")))


Phase = Callable[[Client, Sequence[list[int]]], list[Answer]]


@dataclass(frozen=True)
class Variant:
    """A server and what it is asked, in order."""

    name: str
    options: tuple[str, ...]
    phases: tuple[tuple[str, Phase], ...]
    starts: int = 1
    cache_hits: bool = False


UNCACHED = "--no-enable-prefix-caching"
REFERENCE = Variant("eager", ("--enforce-eager", UNCACHED), (("alone", Client.alone),))
VARIANTS = (
    Variant(
        "graphs",
        (UNCACHED,),
        (
            ("alone", Client.alone),
            ("together", Client.together),
            ("aborts", Client.amid_aborts),
        ),
    ),
    Variant(
        "prefix-caching",
        ("--enable-prefix-caching",),
        (("cold", Client.together), ("warm", Client.together)),
        cache_hits=True,
    ),
    Variant(
        "chunked-prefill",
        (UNCACHED, "--enable-chunked-prefill", "--max-num-batched-tokens", "64",
         "--max-num-seqs", "64"),
        (("together", Client.together),),
    ),
    Variant(
        "restart",
        (UNCACHED,),
        (("together", Client.together),),
        starts=2,
    ),
)  # fmt: skip


class Run:
    """All answers of one variant, by phase, and its perplexity."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.answers: dict[str, list[Answer]] = {}
        self.perplexity = 0.0
        self.problems: list[str] = []
        self.seconds = 0.0

    @contextlib.contextmanager
    def excused(self) -> Iterator[None]:
        """Note a failure; it must not hide what others found."""
        try:
            yield
        except Exception as error:
            self.problems.append(f"{type(error).__name__}: {error}")

    def ask(self, start: int, client: Client, asked: list[list[int]], rows: Any) -> None:
        """Everything that the variant's server is asked after its ``start``-th start."""
        begin = time.monotonic()
        with self.excused():
            for phase, ask in self.variant.phases:
                name = phase if self.variant.starts == 1 else f"{phase}, start {start}"
                self.answers[name] = ask(client, asked)
            self.perplexity = server_perplexity(client.url, NAME, rows)
            if self.variant.cache_hits and not client.metric("vllm:prefix_cache_hits_total"):
                self.problems.append("the prefix cache was never hit")
        self.seconds += time.monotonic() - begin


def carry_out(
    runs: Sequence[Run], start: int, args: argparse.Namespace, asked: list[list[int]], rows: Any
) -> None:
    """The ``start``-th start of the variants' servers, side by side: ask each what it is asked."""
    # Starting and stopping is for the main thread, the only one that may set signal handlers.
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(runs)) as pool:
        up = []
        for run in runs:
            options = [
                "--quantization", args.quantization, "--served-model-name", NAME,
                "--max-model-len", str(CONTEXT), "--max-num-seqs", str(args.requests),
                *shlex.split(args.all_args), *run.variant.options,
            ]  # fmt: skip
            port, log = server.free_port(), args.logs / f"{run.variant.name}-{start}.log"
            with run.excused():
                process = stack.enter_context(
                    server.started(args.folder, options, port=port, log=log, console=console)
                )
                up.append((run, process, port, log))
        asking = []
        for run, process, port, log in up:
            with run.excused():
                server.await_health(process, port, log, console, args.limit)
                client = Client(f"http://127.0.0.1:{port}/v1", args.tokens)
                asking.append(pool.submit(run.ask, start, client, asked, rows))
        for future in asking:
            future.result()


def judge(reference: Run, run: Run, tokens: int) -> list[str]:
    """Print how ``run`` compares; what is wrong with it."""
    problems = [f"{run.variant.name}: {problem}" for problem in run.problems]
    lone = reference.answers.get("alone", [])
    for phase, answers in run.answers.items():
        if not lone:
            break
        found = compare(lone, answers, tokens)
        line = {"variant": run.variant.name, "phase": phase, **vars(found)}
        print("RESULT " + json.dumps(line), flush=True)
        problems += [f"{run.variant.name}, {phase}: {problem}" for problem in found.problems]
    off = run.perplexity / reference.perplexity - 1 if reference.perplexity else float("nan")
    line = {
        "variant": run.variant.name, "perplexity": round(run.perplexity, 4),
        "relative_to_eager": off, "seconds": round(run.seconds, 1),
    }  # fmt: skip
    print("RESULT " + json.dumps(line), flush=True)
    if not abs(off) <= PERPLEXITY:
        problems.append(f"{run.variant.name}: perplexity is {off:+.2e} of the eager engine's")
    return problems


def main() -> None:
    """Parse the arguments, run all servers, print and judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="with m3-nano's tokenizer")
    parser.add_argument("--quantization", default="nvfp4_moe")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32, help="to generate for each request")
    parser.add_argument("--rows", type=int, default=6, help="of 513 tokens, for perplexity")
    parser.add_argument("--variants", nargs="*", choices=[v.name for v in VARIANTS])
    parser.add_argument("--at-once", action="store_true", help="all servers side by side")
    parser.add_argument("--all-args", default="", help="further options of vllm serve")
    parser.add_argument(
        "--limit", type=float, default=300, help="seconds a server may take to start"
    )
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.folder)
    asked = prompts(tokenizer, args.requests)
    pieces = cut(token_stream(tokenizer, standard_library()[1]), 513)
    rows = [next(pieces) for _ in range(args.rows)]
    args.logs = args.logs or Path(tempfile.mkdtemp(prefix="serving-check-"))
    args.logs.mkdir(parents=True, exist_ok=True)
    wanted = [v for v in VARIANTS if not args.variants or v.name in args.variants]
    runs = [Run(variant) for variant in (REFERENCE, *wanted)]
    for start in (1, 2):
        group = [run for run in runs if run.variant.starts >= start]
        for some in [group] if args.at_once else [[run] for run in group]:
            if some:
                carry_out(some, start, args, asked, rows)
    problems = [problem for run in runs for problem in judge(runs[0], run, args.tokens)]
    print("\n".join(f"WRONG {problem}" for problem in problems[:40]) or "VERDICT all as alone")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
