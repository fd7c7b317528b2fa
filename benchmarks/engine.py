"""One vLLM engine, one checkpoint: perplexity, greedy text, token rate; one JSON line.

    python -m benchmarks.engine CHECKPOINT --quantization nvfp4_moe --rows 6 --speed

Perplexity is over the rows of ``examples.perplexity.held_out_rows``, by prompt log-probabilities.
Rows longer than the largest captured CUDA graph run without one, so the same is also measured on
rows of 12 tokens, which do go through graphs where they are on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

PROMPTS = ("def fibonacci(n):\n", "import os\n\nclass ")
SHORT = 12


def longest_run(ids: list[int]) -> int:
    """Length of the longest run of one token."""
    best = run = 0
    for i, token in enumerate(ids):
        run = run + 1 if i and token == ids[i - 1] else 1
        best = max(best, run)
    return best


def prompt_scores(llm: Any, rows: list[list[int]], top: int = 0) -> list[Any]:
    """vLLM's prompt log-probabilities: per row, per position, a dict of token to Logprob."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=top)
    prompts = [{"prompt_token_ids": row} for row in rows]
    return [out.prompt_logprobs for out in llm.generate(prompts, params, use_tqdm=False)]


def perplexity(llm: Any, rows: list[list[int]]) -> float:
    """Over all positions of ``rows`` but each row's first."""
    scores = prompt_scores(llm, rows)
    logs = [
        table[token].logprob
        for row, tables in zip(rows, scores, strict=True)
        for token, table in zip(row[1:], tables[1:], strict=True)
    ]
    return math.exp(-sum(logs) / len(logs))


def save_distributions(llm: Any, rows: list[list[int]], vocabulary: int, file: Path) -> None:
    """Write float32 ``[positions, vocabulary]`` log-probabilities after each token of ``rows``."""
    import numpy as np

    positions = [table for tables in prompt_scores(llm, rows, -1) for table in tables[1:]]
    out = np.full((len(positions), vocabulary), -np.inf, np.float32)
    for i, table in enumerate(positions):
        out[i, list(table)] = [entry.logprob for entry in table.values()]
    np.save(file, out)


def token_rate(llm: Any, batch: int, tokens: int = 128) -> float:
    """Generated tokens a second of ``batch`` equal requests; best of three."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        llm.generate([PROMPTS[0]] * batch, params, use_tqdm=False)
        rates.append(batch * tokens / (time.perf_counter() - start))
    return max(rates)


def measure(llm: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for, as JSON values."""
    from vllm import SamplingParams

    from examples.perplexity import held_out_rows

    tokenizer = llm.get_tokenizer()
    greedy = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    asked = [
        {"prompt_token_ids": [1, *tokenizer.encode(p, add_special_tokens=False)]} for p in PROMPTS
    ]
    outs = [out.outputs[0] for out in llm.generate(asked, greedy, use_tqdm=False)]
    rows = held_out_rows(tokenizer, args.rows)
    line: dict[str, Any] = {
        "texts": [out.text for out in outs],
        "longest_run": max(longest_run(list(out.token_ids)) for out in outs),
        "perplexity": round(perplexity(llm, rows), 4),
        "perplexity_short": round(perplexity(llm, held_out_rows(tokenizer, 48, SHORT)), 4),
    }
    if args.distributions:
        few = held_out_rows(tokenizer, 2, 257)
        save_distributions(llm, few, len(tokenizer), args.distributions)
    if args.speed:
        line["tokens_per_second"] = {n: round(token_rate(llm, n), 1) for n in (1, 16)}
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--quantization")
    parser.add_argument("--rows", type=int, default=48, help="of 513 tokens")
    parser.add_argument("--speed", action="store_true", help="measure token rates too")
    parser.add_argument("--distributions", type=Path, help="write log-probabilities here (.npy)")
    parser.add_argument("--mp", choices=("fork", "spawn"), help="how the engine process starts")
    parser.add_argument("--label", default="")
    parser.add_argument("--engine", default="{}", help="further arguments of vllm.LLM, as JSON")
    args = parser.parse_args()
    if args.mp:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = args.mp
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM

    start = time.perf_counter()
    settings: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 16, "max_logprobs": -1}
    settings |= json.loads(args.engine)
    llm = LLM(args.model, quantization=args.quantization, **settings)
    started = time.perf_counter() - start
    line = {"label": args.label, "model": args.model, "quantization": args.quantization}
    line |= {"start_seconds": round(started, 1)} | measure(llm, args)
    print("RESULT " + json.dumps(line), flush=True)
    # Else vLLM ends its engine while the interpreter goes, and a thread may abort the process.
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
