"""Log-probabilities of fixed random prompts under one engine, for comparing engines.

usage: python -m tests.engine.score MODEL OUT_JSON ENGINE_ARGUMENTS_JSON
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path


def prompts() -> list[list[int]]:
    """Four of a hundred tokens of a vocabulary of 256."""
    draw = random.Random(0)
    return [[draw.randrange(256) for _ in range(100)] for _ in range(4)]


def main(model: str, out: str, settings: str) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model, quantization="nvfp4_moe", skip_tokenizer_init=True, max_model_len=128,
        **json.loads(settings),
    )  # fmt: skip
    rows = prompts()
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    answers = llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
    values = [
        table[token].logprob
        for row, answer in zip(rows, answers, strict=True)
        for token, table in zip(row[1:], answer.prompt_logprobs[1:], strict=True)
    ]
    Path(out).write_text(json.dumps(values))
    # Else vLLM ends its engine while the interpreter goes, and a thread may abort the process.
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
