"""Train a small Qwen3-MoE: a second architecture, with SiLU experts, for the accuracy bench.

    python -m benchmarks.train_qwen3 OUT --tokenizer m3-nano [--minutes 6] [--device cuda]

The text is the Python packages installed beside this interpreter; files that are also in its
standard library are left out, so that the whole of that is held out, as for m3-nano, whose
tokenizer (or another checkpoint's) is taken. By default 34 million parameters of which 8
million work on each token, every size a multiple of 64, as GPU kernels want it.

The seed decides start, text and batches. With ``--steps`` so much that two runs on one machine give
the same weights, as far as its kernels do; with ``--minutes`` the clock decides how far it gets.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when torch loads OpenMP: threads that wait asleep, not spinning, are several times faster
# beside another busy process.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from examples.make_checkpoint import optimizers
from examples.perplexity import held_out_rows, model_perplexity

EXPERTS = "grouped_mm_in_bf16"
LEARNING_RATE, EMBEDDING_RATE, MUON_RATE = 2e-3, 4e-3, 5e-3
WARM_UP = 0.03  # of the run; afterwards straight down to nothing
BALANCE = 0.01
"""Of the router's balancing loss in training: Qwen's 0.001 is for runs a thousand times longer."""
FILES = 512
"""Files tokenised at a time, on all cores."""


@dataclass(frozen=True)
class Sizes:
    """What the model and a step measure."""

    hidden: int = 384
    layers: int = 6
    experts: int = 32
    chosen: int = 4
    intermediate: int = 128
    batch: int = 128
    length: int = 512


def texts(megabytes: float, seed: int, folder: Path | None = None) -> Iterator[str]:
    """Python files under ``folder`` (installed packages), shuffled, each content once."""
    library = Path(sysconfig.get_path("stdlib"))
    seen = {_digest(file.read_bytes()) for file in library.glob("*.py")}
    files = sorted((folder or Path(sysconfig.get_path("purelib"))).rglob("*.py"))
    random.Random(seed).shuffle(files)
    left = megabytes * 1e6
    for file in files:
        data = file.read_bytes()
        digest = _digest(data)
        if digest in seen or not data.strip():
            continue
        seen.add(digest)
        yield data.decode("utf-8", errors="replace")
        left -= len(data)
        if left <= 0:
            return


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def tokenise(tokenizer: Any, source: Iterator[str]) -> torch.Tensor:
    """All texts on end, int32 ``[n]``, each between the tokenizer's bos and eos."""
    parts: list[torch.Tensor] = []
    batch: list[str] = []

    def encode() -> None:
        for coded in tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            ends = tokenizer.bos_token_id, tokenizer.eos_token_id
            ids = [ends[0], *coded.ids, ends[1]]
            parts.append(torch.tensor([i for i in ids if i is not None], dtype=torch.int32))
        batch.clear()

    for text in source:
        batch.append(text)
        if len(batch) == FILES:
            encode()
    encode()
    return torch.cat(parts)


def configuration(sizes: Sizes, tokenizer: Any) -> Qwen3MoeConfig:
    """Qwen3-MoE in everything but size: every layer sparse, no shared expert."""
    heads = sizes.hidden // 64
    return Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,  # of dense layers, which there are none of
        num_hidden_layers=sizes.layers,
        num_attention_heads=heads,
        num_key_value_heads=2 if heads % 2 == 0 else 1,
        head_dim=64,
        moe_intermediate_size=sizes.intermediate,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.chosen,
        norm_topk_prob=True,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


class _InBf16:
    """A module of experts whose weights are bf16: autocast does not know grouped products."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.gate_up_proj = module.gate_up_proj.bfloat16()
        self.down_proj = module.down_proj.bfloat16()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def grouped_in_bf16(module: Any, *inputs: torch.Tensor) -> torch.Tensor:
    """Transformers' grouped experts, computed in bf16 from float32 weights."""
    return grouped_mm_experts_forward(_InBf16(module), *inputs)


def train(
    model: Any, tokens: torch.Tensor, sizes: Sizes, seconds: float, steps: int | None, seed: int
) -> int:
    """Train ``model``, where it is, on ``tokens`` ``[n]``; returns the number of steps.

    Args:
        seconds: of training, if ``steps`` is None.
    """
    device = model.device
    bf16 = device.type == "cuda"
    if bf16:
        ALL_EXPERTS_FUNCTIONS.register(EXPERTS, grouped_in_bf16)
        model.set_experts_implementation(EXPERTS)
    tokens = tokens.to(device)
    generator = torch.Generator().manual_seed(seed)
    tuned = optimizers(model, LEARNING_RATE, EMBEDDING_RATE, MUON_RATE)
    groups = [(group, group["lr"]) for optimizer in tuned for group in optimizer.param_groups]
    span = torch.arange(sizes.length + 1, device=device)
    start, step, shown = time.monotonic(), 0, 0.0
    model.train()
    while True:
        elapsed = time.monotonic() - start
        done = step / steps if steps else elapsed / seconds
        if done >= 1:
            return step
        for group, rate in groups:
            group["lr"] = rate * min(1, (done + 1e-3) / WARM_UP) * (1 - done)
        places = torch.randint(len(tokens) - sizes.length, (sizes.batch, 1), generator=generator)
        batch = tokens[places.to(device) + span].long()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out = model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
        text = F.cross_entropy(out.logits.float().flatten(0, 1), batch[:, 1:].flatten())
        (text + BALANCE * out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in tuned:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if elapsed >= shown:
            shown = elapsed + max(10.0, seconds / 20)
            speed = step * sizes.batch * sizes.length / (time.monotonic() - start)
            print(
                f"{elapsed:5.0f} s  step {step}  loss {text.item():.3f}  "
                f"balance {out.aux_loss.item():.2f}  {speed:,.0f} tokens/s",
                flush=True,
            )


def make(
    out: Path,
    tokenizer_folder: Path,
    sizes: Sizes,
    *,
    minutes: float = 6.0,
    steps: int | None = None,
    device: str = "cpu",
    megabytes: float = 300.0,
    rows: int = 48,
    seed: int = 0,
) -> float:
    """Train and save a checkpoint, in bf16 and with its tokenizer, as the folder ``out``.

    Returns:
        its perplexity over ``rows`` rows of held-out text, computed in float32.
    """
    start = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokens = tokenise(tokenizer, texts(megabytes, seed))
    print(f"{len(tokens):,} tokens of text in {time.monotonic() - start:.0f} s", flush=True)
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM._from_config(
        configuration(sizes, tokenizer), attn_implementation="sdpa"
    )
    count = sum(parameter.numel() for parameter in model.parameters())
    model = model.to(device)
    done = train(model, tokens, sizes, 60 * minutes, steps, seed)
    print(
        f"{count / 1e6:.1f} M parameters, {done} steps, {done * sizes.batch * sizes.length:,} "
        f"tokens, {time.monotonic() - start:.0f} s",
        flush=True,
    )
    model.set_experts_implementation("eager")
    model = model.cpu().bfloat16()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return model_perplexity(model.float().eval().to(device), held_out_rows(tokenizer, rows))


def main() -> None:
    """Parse the arguments, train, print the perplexity."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a checkpoint with one")
    parser.add_argument("--minutes", type=float, default=6.0, help="of training")
    parser.add_argument("--steps", type=int, help="instead of minutes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--megabytes", type=float, default=300.0, help="of text, at most")
    parser.add_argument("--rows", type=int, default=48, help="of held-out text")
    parser.add_argument("--seed", type=int, default=0)
    for name, value in vars(Sizes()).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    sizes = Sizes(**{name: getattr(args, name) for name in vars(Sizes())})
    figure = make(
        args.out, args.tokenizer, sizes, minutes=args.minutes, steps=args.steps,
        device=args.device, megabytes=args.megabytes, rows=args.rows, seed=args.seed,
    )  # fmt: skip
    print(f"{args.out}: perplexity {figure:.4f} over {args.rows} held-out rows")


if __name__ == "__main__":
    main()
