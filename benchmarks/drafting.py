"""Does a head that drafts tokens guess as well for the NVFP4 model as for the one in bf16?

    python -m benchmarks.drafting OUT --tokenizer CHECKPOINT [--tokens 1] [--no-engine]

Trains a small GLM-4.5 together with its multi-token-prediction layer on Python's standard library
(about two minutes of one core; OUT/bf16 is kept), quantizes it, and lets each model go on from
held-out text, greedily. The head is plain PyTorch here, written as vLLM 0.32 computes it
(glm4_moe_mtp.py): ``eh_proj`` of the next token's embedding and the model's output, each normed;
one decoder layer; the norm and the head. How often it guesses what the model then writes is what
vLLM must accept of one token drafted; vLLM's own counts stand beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from examples.perplexity import held_out_rows, standard_library, token_stream

LAYERS = 2
STEPS = 500
TOKENS_A_STEP, LENGTH = 1024, 128
WEIGHT_OF_HEAD = 0.5
"""Of the head's loss beside the model's."""
PROMPT, WRITTEN = 48, 64

Counts = list[tuple[int, int]]
"""Row by row: tokens drafted, and those accepted of them."""


def configuration(vocabulary: int) -> Any:
    """GLM-4.5 in everything but size. Sizes suit GPU kernels, too."""
    from transformers import Glm4MoeConfig

    return Glm4MoeConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, moe_intermediate_size=64,
        num_hidden_layers=LAYERS + 1, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=0,
        n_group=1, topk_group=1, max_position_embeddings=512, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


class Drafting(torch.nn.Module):
    """A model and its head: the model's last layer, which it leaves out itself.

    ``forward`` takes ids ``[B, T]`` and gives the model's logits for all but the last position, and
    the head's: at position ``i``, for the token at ``i + 2``.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeRMSNorm

        model.config.num_hidden_layers = LAYERS
        size, eps = model.config.hidden_size, model.config.rms_norm_eps
        self.model = model
        self.enorm, self.hnorm, self.norm = (Glm4MoeRMSNorm(size, eps) for _ in range(3))
        self.eh_proj = torch.nn.Linear(2 * size, size, bias=False)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        body, following = self.model.model, ids[:, 1:]
        output = body(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        places = torch.arange(following.shape[1], device=ids.device)
        embedded = body.embed_tokens(following) * (places > 0)[None, :, None]  # as vLLM does
        both = torch.cat([self.enorm(embedded), self.hnorm(output)], -1)
        hidden = body.layers[LAYERS](
            self.eh_proj(both),
            position_embeddings=body.rotary_emb(both, places[None]),
            attention_mask=None,  # causal
            position_ids=places[None],
        )
        head = self.model.lm_head
        return head(output), head(self.norm(hidden))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What is in a checkpoint beside Transformers' model."""
        layer = f"model.layers.{LAYERS}."
        own = {
            "enorm": self.enorm, "hnorm": self.hnorm, "eh_proj": self.eh_proj,
            "shared_head.norm": self.norm, "shared_head.head": self.model.lm_head,
            "embed_tokens": self.model.model.embed_tokens,
        }  # fmt: skip
        return {
            f"{layer}{name}.weight": m.weight.detach().bfloat16().clone() for name, m in own.items()
        }


def train(tokens: torch.Tensor, vocabulary: int, steps: int, seed: int) -> Drafting:
    """Train model and head together on ``tokens`` ``[N]``; the same steps each time."""
    from transformers import Glm4MoeForCausalLM
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

    from examples.make_checkpoint import EMBEDDING_STD, EXPERT_STD, dense_experts, optimizers

    torch.manual_seed(seed)
    ALL_EXPERTS_FUNCTIONS.register("dense_for_training", dense_experts)
    model = Glm4MoeForCausalLM._from_config(
        configuration(vocabulary),
        attn_implementation="sdpa",
        experts_implementation="dense_for_training",
    )
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
    for module in model.modules():
        if isinstance(module, Glm4MoeExperts):
            torch.nn.init.normal_(module.gate_up_proj, std=EXPERT_STD)
            torch.nn.init.normal_(module.down_proj, std=EXPERT_STD)
    drafting = Drafting(model).train()
    tuned = optimizers(drafting)
    groups = [(group, group["lr"]) for optimizer in tuned for group in optimizer.param_groups]
    for step in range(steps):
        for group, rate in groups:
            done = step / steps
            group["lr"] = rate * min(1, (done + 1e-3) / 0.05) * (1 - done)
        starts = torch.randint(len(tokens) - LENGTH - 1, (TOKENS_A_STEP // LENGTH, 1))
        ids = tokens[starts + torch.arange(LENGTH + 1)]
        text, drafts = drafting(ids)
        loss = F.cross_entropy(text.flatten(0, 1), ids[:, 1:].flatten())
        guess = F.cross_entropy(drafts[:, :-1].flatten(0, 1), ids[:, 2:].flatten())
        (loss + WEIGHT_OF_HEAD * guess).backward()
        torch.nn.utils.clip_grad_norm_(drafting.parameters(), 1.0)
        for optimizer in tuned:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}  loss {loss.item():.2f}  head's {guess.item():.2f}", flush=True)
    model.set_experts_implementation("eager")
    return drafting.eval()


def make(out: Path, tokenizer_folder: Path, steps: int, seed: int = 0) -> None:
    """Train, and save the folder ``out`` as the family publishes it: in bf16, head included."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    training, _ = standard_library()
    tokens = torch.tensor(list(token_stream(tokenizer, training)))
    drafting = train(tokens, len(tokenizer), steps, seed)
    partial = out.with_name(f".{out.name}.partial")
    drafting.model.bfloat16().save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    file = partial / "model.safetensors"
    save_file(load_file(file) | drafting.tensors(), file, {"format": "pt"})
    config = json.loads((partial / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    (partial / "config.json").write_text(json.dumps(config))
    partial.rename(out)


def load(folder: Path, experts: Path | None = None) -> Drafting:
    """The model and head of the bf16 checkpoint ``folder``, in float32; with the target's experts
    of the quantized checkpoint ``experts``, if there is one."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    from quantize.layouts import LAYOUTS

    config = Glm4MoeConfig.from_pretrained(folder)
    config.num_hidden_layers = LAYERS + 1
    drafting = Drafting(Glm4MoeForCausalLM._from_config(config, attn_implementation="sdpa"))
    tensors = load_file(folder / "model.safetensors")
    if experts is not None:
        layout, stored = LAYOUTS["modelopt"], load_file(experts / "model.safetensors")
        for name in [n.removesuffix("_scale_2") for n in stored if n.endswith("weight_scale_2")]:
            module = name.removesuffix(".weight")
            parts = {
                s: stored[f"{module}.{s}"] for s in layout.suffixes if f"{module}.{s}" in stored
            }
            tensors[name] = layout.restore(parts)[0].dequantize()
    prefix = f"model.layers.{LAYERS}."
    for name, module in (
        ("enorm", drafting.enorm), ("hnorm", drafting.hnorm), ("eh_proj", drafting.eh_proj),
        ("shared_head.norm", drafting.norm),
    ):  # fmt: skip
        module.weight.data.copy_(tensors.pop(f"{prefix}{name}.weight"))
    state = drafting.model.state_dict()
    for name, parameter in state.items():
        if ".experts." not in name:
            parameter.copy_(tensors[name])
            continue
        kinds = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
        above = name.rpartition(".")[0]
        for expert in range(config.n_routed_experts):
            rows = torch.cat([tensors[f"{above}.{expert}.{kind}.weight"].float() for kind in kinds])
            parameter[expert].copy_(rows)
    return drafting.float().eval()


@torch.inference_mode()
def written(drafting: Drafting, rows: list[list[int]]) -> list[list[int]]:
    """What the model writes after ``rows``, greedily."""
    ids = torch.tensor(rows)
    for _ in range(WRITTEN):
        following = drafting.model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, following[:, None]], 1)
    return ids[:, len(rows[0]) :].tolist()


@torch.inference_mode()
def counted(drafting: Drafting, rows: list[list[int]], texts: list[list[int]]) -> Counts:
    """How many tokens of ``texts``, which the model wrote after ``rows``, its head drafts one at a
    time, and how many of those it guesses, row by row.

    A token that is guessed brings another, which the model adds and nobody drafts.
    """
    ids, first = torch.tensor([row + text for row, text in zip(rows, texts, strict=True)]), PROMPT
    # Position i guesses token i + 2; the first token written is nobody's guess.
    right = drafting(ids)[1].argmax(-1)[:, first - 1 : -1] == ids[:, first + 1 :]
    found = []
    for row in right.tolist():
        place = drafted = accepted = 0
        while place < len(row):
            drafted, accepted = drafted + 1, accepted + row[place]
            place += 1 + row[place]
        found.append((drafted, accepted))
    return found


@torch.inference_mode()
def agreed(drafting: Drafting, rows: list[list[int]]) -> Counts:
    """On ``rows`` of text that nobody here wrote: at how many positions the head guesses the token
    that the model itself would write next."""
    text, drafts = (logits.argmax(-1) for logits in drafting(torch.tensor(rows)))
    right = drafts[:, :-1] == text[:, 1:]
    return [(len(row), int(row.sum())) for row in right]


def by_vllm(settings: dict[str, Any], rows: list[list[int]]) -> dict[str, Any]:
    """The same by vLLM with ``settings``, in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        skip_tokenizer_init=True, max_model_len=256, disable_log_stats=False,
        enable_prefix_caching=False, enforce_eager=True, **settings,
    )  # fmt: skip
    params = SamplingParams(
        temperature=0, max_tokens=WRITTEN, ignore_eos=True, detokenize=False, logprobs=2
    )
    answers = llm.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
    counts = {m.name: getattr(m, "value", 0) for m in llm.get_metrics()}
    # By how much the model preferred each token that it wrote: near a tie, roundings decide.
    margins = [
        [
            sorted((each.logprob for each in step.values()), reverse=True)
            for step in a.outputs[0].logprobs
        ]
        for a in answers
    ]
    llm.llm_engine.engine_core.shutdown()
    return {
        "drafted": int(counts.get("vllm:spec_decode_num_draft_tokens", 0)),
        "accepted": int(counts.get("vllm:spec_decode_num_accepted_tokens", 0)),
        "text": [list(answer.outputs[0].token_ids) for answer in answers],
        "margins": margins,
    }


def told(name: str, rows: Counts) -> str:
    """A line with the share that is accepted and its standard error, over rows: tokens of one row
    are not independent of each other."""
    drafted, accepted = (sum(row[kind] for row in rows) for kind in (0, 1))
    share = accepted / drafted
    error = math.sqrt(sum((a - share * d) ** 2 for d, a in rows)) / drafted
    return f"{name}: {accepted} of {drafted}, {share:.3f} +- {error:.3f}"


def main() -> None:
    """Train if need be, quantize, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a checkpoint with one")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--rows", type=int, default=48, help="of held-out text")
    parser.add_argument("--tokens", type=int, default=1, help="drafted at a time, by vLLM")
    parser.add_argument("--no-engine", action="store_true", help="plain PyTorch alone")
    parser.add_argument("--engine", default="{}", help="further arguments of vllm.LLM, as JSON")
    args = parser.parse_args()
    bf16, quantized = args.out / "bf16", args.out / "nvfp4"
    args.out.mkdir(parents=True, exist_ok=True)
    if not bf16.exists():
        make(bf16, args.tokenizer, args.steps)
    if not quantized.exists():
        from quantize.checkpoint.reader import Checkpoint
        from quantize.execute import execute
        from quantize.run.plan import plan

        with Checkpoint(bf16) as source:
            execute(source, plan(source), quantized)

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bf16)
    rows = held_out_rows(tokenizer, args.rows, PROMPT)
    longer = held_out_rows(tokenizer, args.rows, 4 * PROMPT)
    models = {"bf16": (bf16, load(bf16)), "NVFP4": (quantized, load(bf16, quantized))}
    on_text = {name: agreed(drafting, longer) for name, (_, drafting) in models.items()}
    for name, (_, drafting) in models.items():
        print(told(f"{name}, held-out text, plain PyTorch", on_text[name]), flush=True)
        own = counted(drafting, rows, written(drafting, rows))
        print(told(f"{name}, its own text, plain PyTorch", own), flush=True)
    less = [(d, a - b) for (d, a), (_, b) in zip(*on_text.values(), strict=True)]
    print(told("bf16 less NVFP4, held-out text", less), flush=True)
    if args.no_engine:
        return
    speculate = {"speculative_config": {"method": "mtp", "num_speculative_tokens": args.tokens}}
    settings = json.loads(args.engine)
    for name, (folder, drafting) in models.items():
        found = []
        for more in ({}, speculate):
            # One process an engine: each takes the device, and sets up its own.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                found.append(
                    pool.submit(by_vllm, settings | {"model": str(folder), **more}, rows).result()
                )
        alone, drafted = found
        share = drafted["accepted"] / drafted["drafted"]
        print(f"{name}, vLLM: {drafted['accepted']} of {drafted['drafted']}, {share:.3f}")
        if args.tokens == 1:
            expected = counted(drafting, rows, drafted["text"])
            print(told(f"{name}, vLLM's text, plain PyTorch", expected), flush=True)
        differ = [
            (n, next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y))
            for n, (a, b) in enumerate(zip(alone["text"], drafted["text"], strict=True))
            if a != b
        ]
        margins = [alone["margins"][n][i] for n, i in differ]
        widest = max((m[0] - m[1] if len(m) > 1 else 0.0 for m in margins), default=0.0)
        print(
            f"{name}: {len(rows) - len(differ)} of {len(rows)} texts are the same with and without "
            f"drafting; where they part, the first two tokens were at most {widest:.3f} apart",
            flush=True,
        )


if __name__ == "__main__":
    main()
