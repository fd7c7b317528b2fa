"""Perplexity of a checkpoint on held-out Python: through Transformers, and through a vLLM server.

Both ways score the same tokens at the same positions, so that the two figures differ by nothing
but the weights and the engine. The text is the running interpreter's own standard library, of
which every third module is held out: `make_checkpoint.py` never trains on those.

    python -m examples.perplexity CHECKPOINT [--rows 8] [--server http://127.0.0.1:8000/v1]
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Rows = list[list[int]]


def standard_library() -> tuple[list[Path], list[Path]]:
    """The top-level modules of this interpreter's standard library, as (training, held-out) files.

    Every third file in the order of the names is held out.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    held_out = files[::3]
    return [file for file in files if file not in set(held_out)], held_out


def token_stream(tokenizer: Any, files: Sequence[Path]) -> Iterator[int]:
    """The ids of all files on end, each between the tokenizer's bos and eos ids (where it has any).

    Lazy: a caller who needs only the first few rows tokenises only the first few files.
    """
    for file in files:
        text = file.read_text(encoding="utf-8", errors="replace")
        if tokenizer.bos_token_id is not None:
            yield tokenizer.bos_token_id
        yield from tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id


def cut(stream: Iterator[int], length: int) -> Iterator[list[int]]:
    """Cut a stream of ids into whole rows of `length`; a shorter rest is dropped."""
    row: list[int] = []
    for token in stream:
        row.append(token)
        if len(row) == length:
            yield row
            row = []


def held_out_rows(tokenizer: Any, rows: int, length: int = 513) -> Rows:
    """The first `rows` rows of `length` token ids of the held-out standard library.

    `length` tokens give `length - 1` scored positions: the first of a row has nothing before it.
    A server needs a context of at least `length + 1`, as vLLM always generates one token.
    """
    _, held_out = standard_library()
    found: Rows = []
    for row in cut(token_stream(tokenizer, held_out), length):
        found.append(row)
        if len(found) == rows:
            break
    return found


def perplexity(model_dir: str | Path, rows: Rows, *, dtype: str = "float32") -> float:
    """Perplexity of the checkpoint at `model_dir` over `rows`, with Transformers on the CPU.

    The weights are the checkpoint's (bf16, as a rule); `dtype` is what they are computed in:
    "float32", in which the figure carries no rounding of ours, or "bfloat16" for half the memory.
    """
    import torch
    from transformers import AutoModelForCausalLM

    # Saved in bf16, so loading it straight into `dtype` rounds nothing.
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
    try:
        return model_perplexity(model, rows)
    finally:
        del model
        gc.collect()


def model_perplexity(model: Any, rows: Rows) -> float:
    """Perplexity of a Transformers causal language model, already in memory, over `rows`."""
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for row in rows:  # one at a time: a row of a large vocabulary's logits is memory enough
            ids = torch.tensor([row], device=model.device)
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            total, count = total + loss.item(), count + len(row) - 1
    return math.exp(total / count)


def server_perplexity(base_url: str, model: str, rows: Rows, *, timeout: float = 600.0) -> float:
    """Perplexity of `model` at the vLLM server under `base_url` (".../v1") over the same positions.

    Each row is sent as a prompt of token ids, one request a row, and vLLM reports the
    log-probability of every prompt token but the first (`prompt_logprobs`, in nats).

    Raises ValueError when the answer does not hold one log-probability for each token but the
    first of its row: no figure is better than one over other positions.
    """
    from openai import OpenAI

    client = OpenAI(base_url=base_url, api_key="none", timeout=timeout, max_retries=0)
    total, count = 0.0, 0
    for number, row in enumerate(rows):
        answer = client.completions.create(
            model=model,
            prompt=row,
            max_tokens=1,
            temperature=0.0,
            # 0: the prompt's own tokens alone, without the most likely ones beside them.
            extra_body={"prompt_logprobs": 0},
        )
        scored = (answer.choices[0].model_extra or {}).get("prompt_logprobs") or []
        if len(scored) != len(row):
            raise ValueError(
                f"row {number}: {len(row)} tokens sent to {base_url}, {len(scored)} scored; "
                "is this a vLLM server?"
            )
        for token, options in zip(row[1:], scored[1:], strict=True):
            if str(token) not in options:
                raise ValueError(f"row {number}: no log-probability of token {token} in the answer")
            total -= options[str(token)]["logprob"]
        count += len(row) - 1
    return math.exp(total / count)


def context_length(model_dir: str | Path) -> int | None:
    """`max_position_embeddings` of a local checkpoint's config.json, None where it has none."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    return config.get("max_position_embeddings") or config.get("text_config", {}).get(
        "max_position_embeddings"
    )


def main() -> None:
    """Print the perplexity of a checkpoint, or of what a server serves."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("checkpoint", help="a local checkpoint; with --server, for its tokenizer")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=513, help="tokens a row")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--server", metavar="URL", help="e.g. http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="the name it is served under; default: CHECKPOINT")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    length = min(args.length, context_length(args.checkpoint) or args.length)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    rows = held_out_rows(tokenizer, args.rows, length)
    if args.server:
        figure = server_perplexity(args.server, args.model or args.checkpoint, rows)
    else:
        figure = perplexity(args.checkpoint, rows, dtype=args.dtype)
    print(f"perplexity {figure:.4f} over {len(rows)} rows of {length} tokens")


if __name__ == "__main__":
    main()
