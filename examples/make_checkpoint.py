"""Make a small MiniMax-M3 checkpoint on the spot: nothing is downloaded, nothing is random noise.

    python -m examples.make_checkpoint OUT [--steps STEPS] [--overwrite]

Trains a byte-level BPE tokenizer and a 5 M parameter `MiniMaxM3VLForCausalLM` on this
interpreter's own standard library, for a fixed number of steps, and saves both as Transformers
would: bf16, the experts of a layer fused in one tensor. The model writes what looks like Python,
which is all it is for: with random weights a wrong gate or a wrong scale would go unnoticed, here
it shows in the held-out perplexity.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Read when torch loads OpenMP: threads that wait asleep, not spinning, make several times the
# steps beside another busy process, and lose little alone.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import MiniMaxM3VLTextConfig, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import (
    MiniMaxM3VLExperts,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLTopKRouter,
)

from examples.perplexity import held_out_rows, model_perplexity, standard_library, token_stream

PAD, BOS, EOS = 0, 1, 2
VOCABULARY = 2048
CONTEXT = 1024
LAYERS = 4

# The model has only ever seen Python, so a question is put to it as a module would state it: in
# the docstring at its top, which it goes on from. Its own earlier answers are code, and stay so.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content }}\n\n"
    '{% else %}"""{{ message.content }}"""\n\n{% endif %}'
    "{% endfor %}"
)

# The schedule, found by trying: at this size and in so few steps, Muon on the plain matrices and a
# large learning rate on the embeddings halve the perplexity that AdamW alone reaches.
STEPS = 600  # about a minute and a half on two cores
TOKENS_A_STEP = 1024
LEARNING_RATE, EMBEDDING_RATE, MUON_RATE = 3e-3, 1e-2, 1e-2
EMBEDDING_STD = 0.3
EXPERT_STD = 0.06  # well above the usual 0.02, so that in so few steps the experts matter
WEIGHT_DECAY = 0.1
WARM_UP = 0.05  # of the steps; afterwards straight down to nothing
BALANCE_RATE = 1e-2  # a step's change of the router's correction bias

console = Console()


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer over the training files, with a chat template.

    Every text can be written in it, as all 256 bytes are tokens; ids 0, 1, 2 are the specials.
    """
    bpe = Tokenizer(models.BPE())
    # A newline is a token of its own and never merges with the indentation that follows it.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    training, _ = standard_library()
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in training)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def configuration() -> MiniMaxM3VLTextConfig:
    """MiniMax-M3 in everything but size: a dense layer, then sparse ones, all full attention."""
    return MiniMaxM3VLTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=LAYERS,
        layer_types=["full_attention"] * LAYERS,
        mlp_layer_types=["dense"] + ["sparse"] * (LAYERS - 1),
        dense_intermediate_size=512,
        shared_intermediate_size=64,
        intermediate_size=64,
        num_local_experts=16,
        num_experts_per_tok=4,
        routed_scaling_factor=2.0,
        swiglu_alpha=1.702,
        swiglu_limit=7.0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rotary_dim=32,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
        },
        max_position_embeddings=CONTEXT,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )


def dense_experts(
    experts: MiniMaxM3VLExperts, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every token through every expert, and nothing left of those not chosen. For training only.

    The same sum as the class's own forward. Two large products are faster on a CPU than a few
    dozen small ones with their gathers and scatters, as long as the experts are this small.

    `hidden` [T, H], `chosen` and `weights` [T, K]; returns [T, H].
    """
    count, width, hidden_size = experts.num_experts, experts.intermediate_dim, hidden.shape[1]
    share = weights.new_zeros(len(hidden), count).scatter(1, chosen, weights)
    # All the experts' gates side by side, then all their ups: `_apply_gate` halves the last axis.
    gate_up = experts.gate_up_proj.view(count, 2, width, hidden_size).transpose(0, 1)
    inner = experts._apply_gate(F.linear(hidden, gate_up.reshape(-1, hidden_size)))
    inner = inner.view(-1, count, width) * share.to(inner.dtype)[..., None]
    down = experts.down_proj.transpose(0, 1).reshape(hidden_size, -1)
    return F.linear(inner.flatten(1), down)


@contextlib.contextmanager
def balanced(model: MiniMaxM3VLForCausalLM) -> Iterator[None]:
    """Within, let every forward move the routers' correction biases towards an even load.

    This is how such routers are trained: an expert chosen less than the average becomes a little
    easier to choose, without its weight in the sum changing.
    """

    def adjust(router: MiniMaxM3VLTopKRouter, _: Any, output: tuple[torch.Tensor, ...]) -> None:
        load = torch.bincount(output[2].flatten(), minlength=router.num_experts).float()
        router.e_score_correction_bias.add_(torch.sign(load.mean() - load), alpha=BALANCE_RATE)

    hooks = [
        module.register_forward_hook(adjust)
        for module in model.modules()
        if isinstance(module, MiniMaxM3VLTopKRouter)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def optimizers(
    model: torch.nn.Module,
    rate: float = LEARNING_RATE,
    embedding_rate: float = EMBEDDING_RATE,
    muon_rate: float = MUON_RATE,
) -> list[torch.optim.Optimizer]:
    """Muon for the plain matrices; AdamW for embeddings, routers, stacked experts and norms."""
    plain, embeddings, norms, others = [], [], [], []
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name or "lm_head" in name:
            embeddings.append(parameter)
        elif parameter.ndim == 1:
            norms.append(parameter)
        elif parameter.ndim == 2 and not name.endswith("mlp.gate.weight"):
            plain.append(parameter)
        else:
            others.append(parameter)
    muon = torch.optim.Muon(
        plain, lr=muon_rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [
            {"params": others, "lr": rate, "weight_decay": WEIGHT_DECAY},
            {"params": norms, "lr": rate, "weight_decay": 0.0},
            {"params": embeddings, "lr": embedding_rate, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    return [muon, adamw]


def train(tokens: torch.Tensor, steps: int, seed: int) -> MiniMaxM3VLForCausalLM:
    """Train for `steps` steps on `tokens` [N]; returns the model in float32, on the CPU.

    By steps, not by the clock: on a busy machine it takes longer, and learns as much. A seed gives
    the same start and the same batches, and the same weights but for the kernels' rounding.
    """
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # bf16 is the faster only where the hardware has it.
    bf16 = device == "cuda" or torch.cpu.get_capabilities().get("avx512_bf16", False)
    ALL_EXPERTS_FUNCTIONS.register("dense_for_training", dense_experts)
    model = MiniMaxM3VLForCausalLM._from_config(
        configuration(), attn_implementation="sdpa", experts_implementation="dense_for_training"
    )
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
    for module in model.modules():
        if isinstance(module, MiniMaxM3VLExperts):
            torch.nn.init.normal_(module.gate_up_proj, std=EXPERT_STD)
            torch.nn.init.normal_(module.down_proj, std=EXPERT_STD)
    model.to(device).train()
    tuned = optimizers(model)
    groups = [(group, group["lr"]) for optimizer in tuned for group in optimizer.param_groups]

    bar = Progress(
        TextColumn("training"),
        BarColumn(),
        TextColumn("step {task.completed} of {task.total}  loss {task.fields[loss]:.2f}"),
        TimeRemainingColumn(),
        console=console,
    )
    with balanced(model), bar:
        task = bar.add_task("", total=steps, loss=float("nan"))
        for step in range(steps):
            done = step / steps
            for group, rate in groups:
                group["lr"] = rate * min(1, (done + 1e-3) / WARM_UP) * (1 - done)
            # Short rows make fast steps; longer ones at the end teach the farther positions.
            length = 256 if done < 2 / 3 else 512
            starts = torch.randint(len(tokens) - length, (TOKENS_A_STEP // length, 1))
            batch = tokens[starts + torch.arange(length + 1)].to(device)
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in tuned:
                optimizer.step()
                optimizer.zero_grad()
            bar.update(task, completed=step + 1, loss=loss.item())
    model.set_experts_implementation("eager")
    return model.cpu().eval()


def make(
    out: Path, steps: int = STEPS, *, seed: int = 0, overwrite: bool = False, rows: int = 8
) -> float:
    """Train tokenizer and model, and save them as the checkpoint folder `out`.

    Beside the training it takes about ten seconds. The folder appears complete or not at all.
    Returns the perplexity of the saved bf16 weights over `rows` held-out rows of 513.

    Raises FileExistsError when `out` is there and not an empty folder, unless `overwrite`.
    """
    out = Path(out)
    if not overwrite and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; --overwrite replaces it")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        tokenizer = train_tokenizer()
        training, _ = standard_library()
        tokens = torch.tensor(list(token_stream(tokenizer, training)))
        console.print(f"{len(tokens):,} tokens of {len(training)} modules of the standard library")
        model = train(tokens, steps, seed).to(torch.bfloat16)
        figure = model_perplexity(model.float(), held_out_rows(tokenizer, rows))
        model.to(torch.bfloat16).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if out.is_file():
            out.unlink()
        else:
            shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(f"{out}: held-out perplexity {figure:.2f}")
    return figure


def main() -> None:
    """Parse the arguments and make the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"of training, {STEPS} if not given"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true", help="replace what is at OUT")
    args = parser.parse_args()
    try:
        make(args.out, args.steps, seed=args.seed, overwrite=args.overwrite)
    except FileExistsError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
