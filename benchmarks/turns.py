"""Token rates of engines that take turns in one process, on a CPU.

    python -m benchmarks.turns bf16=SRC nvfp4=DST nothing=DST [--rounds 16]

Each round has every engine answer the same requests, so what else runs on the machine slows them
alike; a ratio is the median of the rounds'. The bf16 engine needs ``n_group`` and ``topk_group``
set to 1, since vLLM-CPU routes by sigmoid only in groups; it also applies SiLU in place of the
model's gate, which costs it nothing. ``nothing`` is our engine with experts that do nothing: what
the rest of the engine takes, and so the highest ratio that any kernel could have.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from contextlib import ExitStack
from typing import Any
from unittest import mock

from benchmarks.engine import PROMPTS, perplexity

BATCHES = (1, 4, 16)
ENGINES = ("bf16", "nvfp4", "nothing")
TOKENS = 48


def engine(kind: str, model: str) -> Any:
    """A new engine of this process, one of :data:`ENGINES`."""
    import torch
    from vllm import LLM

    from vllm_nvfp4_moe.backends.cpu.method import CpuMethod

    settings: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 16, "max_logprobs": -1}
    if kind == "bf16":
        return LLM(model, hf_overrides={"n_group": 1, "topk_group": 1}, **settings)

    def nothing(_: Any, layer: Any, x: torch.Tensor, *__: Any, **___: Any) -> torch.Tensor:
        return torch.zeros_like(x)

    with ExitStack() as stack:
        if kind == "nothing":  # whose graph is compiled while it is made, and is not the other's
            stack.enter_context(mock.patch.object(CpuMethod, "apply", nothing))
            changed = {"NVFP4_MOE_SELF_CHECK": "0", "VLLM_DISABLE_COMPILE_CACHE": "1"}
            stack.enter_context(mock.patch.dict(os.environ, changed))
        return LLM(model, quantization="nvfp4_moe", **settings)


def measure(models: dict[str, str], rounds: int) -> dict[str, Any]:
    """By engine: perplexity, and by the number of requests the tokens a second of each round."""
    from vllm import SamplingParams

    from examples.perplexity import held_out_rows

    engines = {kind: engine(kind, model) for kind, model in models.items()}
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    found: dict[str, Any] = {}
    for kind, llm in engines.items():
        rows = held_out_rows(llm.get_tokenizer(), 6)
        found[kind] = {"perplexity": round(perplexity(llm, rows), 4)}
        found[kind] |= {str(batch): [] for batch in BATCHES}
    for _ in range(rounds):
        for batch in BATCHES:
            for kind, llm in engines.items():
                start = time.perf_counter()
                llm.generate([PROMPTS[0]] * batch, params, use_tqdm=False)
                found[kind][str(batch)].append(batch * TOKENS / (time.perf_counter() - start))
    return found


def ratio(found: dict[str, Any], kind: str, batch: str) -> float:
    """The median of the rounds' ratios to the first engine, in :func:`measure`'s result."""
    first = next(iter(found.values()))
    return statistics.median(a / b for a, b in zip(found[kind][batch], first[batch], strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engines", nargs="+", metavar="KIND=CHECKPOINT", help=str(ENGINES))
    parser.add_argument("--rounds", type=int, default=16)
    asked = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    models = dict(each.split("=", 1) for each in asked.engines)
    found = measure(models, asked.rounds)
    for batch in map(str, BATCHES):
        for kind, one in found.items():
            rate = statistics.median(one[batch])
            print(f"{batch} requests, {kind}: {rate:.0f}/s, ratio {ratio(found, kind, batch):.2f}")
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
