"""A small GPT-OSS: trained in bf16, rounded to MXFP4 as OpenAI's is, and what NVFP4 makes of both.

    python -m benchmarks.gpt_oss OUT --tokenizer CHECKPOINT [--steps 600] [--rules max mse]

GPT-OSS has what the other models of these benches have not: biases of experts, gate and up in
alternate columns of a stack ``[experts, in, out]``, attention sinks, and an original in MXFP4. It
is trained on Python's standard library (``examples.perplexity``), with the tokenizer of a
checkpoint, for a fixed number of steps, on the CPU; with the table that takes about four minutes of
one core. OUT then has

* ``bf16``, the trained model, and ``mxfp4``, the same in OpenAI's layout: each 32 weights of a
  column share a power of two, and are rounded to the nearest of E2M1's values (OCP MX 1.0, 6.3);
* ``bf16-RULE`` and ``mxfp4-RULE``: what this package makes of either, by each of ``--rules``.

The table has the mean KL to what each was made of, and to bf16 (see ``benchmarks.accuracy``). All
are computed by Transformers' own classes in float32, from dequantized weights; so a bias that was
lost, or given to another expert, counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

# Read when torch loads OpenMP: threads that wait asleep, not spinning, are several times faster
# beside another busy process.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GptOssConfig, GptOssForCausalLM, Mxfp4Config
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from benchmarks.accuracy import Bench, Figures
from benchmarks.stored import read
from examples.perplexity import standard_library, token_stream
from quantize.checkpoint.reader import Checkpoint
from quantize.execute import execute
from quantize.nvfp4.scales import RULES
from quantize.run.options import Options
from quantize.run.plan import plan

TOKENS_A_STEP, LENGTH = 1024, 256
RATE, EMBEDDING_RATE = 3e-3, 1e-2
WARM_UP, BALANCE = 0.05, 0.01
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
MX_BLOCK = 32


def configuration(tokenizer: Any) -> GptOssConfig:
    """GPT-OSS in everything but size: sliding and full attention in turns, all layers sparse."""
    return GptOssConfig(
        vocab_size=len(tokenizer), hidden_size=256, num_hidden_layers=4, intermediate_size=64,
        num_local_experts=16, num_experts_per_tok=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, sliding_window=128, max_position_embeddings=1024,
        rope_parameters={"rope_type": "yarn", "rope_theta": 10000.0, "factor": 1.0,
                         "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                         "original_max_position_embeddings": 1024},
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip


def dense_experts(
    experts: Any, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The class's own sum, by every token through every expert: faster in training, where experts
    are small.

    ``hidden`` is ``[tokens, hidden]``, ``chosen`` and ``weights`` are ``[tokens, k]``.
    """
    share = weights.new_zeros(len(hidden), experts.num_experts).scatter(1, chosen, weights)
    both = torch.einsum("th,ehi->tei", hidden, experts.gate_up_proj) + experts.gate_up_proj_bias
    inner = experts._apply_gate(both) * share.unsqueeze(-1)
    return torch.einsum("tei,eih->th", inner, experts.down_proj) + share @ experts.down_proj_bias


def train(tokens: torch.Tensor, config: GptOssConfig, steps: int, seed: int) -> Any:
    """A model trained for ``steps`` steps on ``tokens`` ``[n]``, in float32."""
    torch.manual_seed(seed)
    ALL_EXPERTS_FUNCTIONS.register("dense_gpt_oss", dense_experts)
    model: Any = GptOssForCausalLM._from_config(
        config, attn_implementation="eager", experts_implementation="dense_gpt_oss"
    )
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    embeddings, plain, others = [], [], []
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            torch.nn.init.normal_(parameter, std=0.06)
        if "embed_tokens" in name or "lm_head" in name:
            embeddings.append(parameter)
        elif parameter.ndim == 2 and "self_attn" in name:
            plain.append(parameter)
        else:
            others.append(parameter)
    tuned: list[torch.optim.Optimizer] = [
        torch.optim.Muon(plain, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": others, "lr": RATE}, {"params": embeddings, "lr": EMBEDDING_RATE}],
            betas=(0.9, 0.95), weight_decay=0.0, fused=True,
        ),
    ]  # fmt: skip
    groups = [(group, group["lr"]) for optimizer in tuned for group in optimizer.param_groups]
    model.train()
    for step in range(steps):
        done = step / steps
        for group, rate in groups:
            group["lr"] = rate * min(1, (done + 1e-3) / WARM_UP) * (1 - done)
        starts = torch.randint(len(tokens) - LENGTH, (TOKENS_A_STEP // LENGTH, 1))
        batch = tokens[starts + torch.arange(LENGTH + 1)]
        with torch.autocast("cpu", torch.bfloat16):
            out = model(input_ids=batch[:, :-1], use_cache=False, output_router_logits=True)
        text = F.cross_entropy(out.logits.float().flatten(0, 1), batch[:, 1:].flatten())
        (text + BALANCE * out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in tuned:
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0 or step + 1 == steps:
            print(f"step {step + 1} of {steps}  loss {text.item():.3f}", flush=True)
    model.set_experts_implementation("eager")
    return model.eval()


def to_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A stack ``[experts, in, out]`` as OpenAI stores it.

    Returns:
        blocks, uint8 ``[experts, out, in / 32, 16]``, the low nibble first; scales, uint8
        ``[experts, out, in / 32]``, powers of two with a bias of 127.
    """
    blocks = weight.float().transpose(1, 2).unflatten(-1, (-1, MX_BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    # E2M1's largest power of two is 2^2. An all-zero block takes the smallest scale.
    power = (largest.log2().floor() - 2).clamp(-127, 127)
    size = (blocks.abs() / power.exp2()).contiguous()
    between = (E2M1[1:] + E2M1[:-1]) / 2
    low, high = torch.bucketize(size, between), torch.bucketize(size, between, right=True)
    codes = torch.where(low % 2 == 0, low, high) | ((blocks < 0).long() << 3)  # ties to even
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return packed.to(torch.uint8), (power.squeeze(-1) + 127).to(torch.uint8)


def write_mxfp4(source: Path, target: Path) -> None:
    """``source``, a bf16 GPT-OSS, in OpenAI's layout."""
    target.mkdir()
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = to_mxfp4(tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    for file in source.glob("*.json"):
        shutil.copy(file, target)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (target / "config.json").write_text(json.dumps(config))


def original(folder: Path) -> Any:
    """Transformers' model of an unquantized or MXFP4 folder, in float32."""
    config = json.loads((folder / "config.json").read_text())
    told = {}
    if "quantization_config" in config:
        # In bf16, which holds each of MXFP4's values.
        told = {"quantization_config": Mxfp4Config(dequantize=True)}
    model: Any = GptOssForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **told)
    model.set_experts_implementation("eager")
    return model.float().eval()


def from_nvfp4(folder: Path, source: Path) -> Any:
    """Transformers' model with ``folder``'s experts: weights as they dequantize, biases as they
    are. All else is that of ``source``, which ``folder`` was made of."""
    model = original(source)
    layers, _ = read(folder)
    stored = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for number, weights in layers.items():
            experts = model.model.layers[number].mlp.experts
            rows = weights.gate_up.shape[1] // 2
            experts.gate_up_proj[..., 0::2] = weights.gate_up[:, :rows].transpose(1, 2)
            experts.gate_up_proj[..., 1::2] = weights.gate_up[:, rows:].transpose(1, 2)
            experts.down_proj.copy_(weights.down.transpose(1, 2))
            for expert in range(len(weights.down)):
                prefix = f"model.layers.{number}.mlp.experts.{expert}."
                both = experts.gate_up_proj_bias[expert]
                both[0::2] = stored[f"{prefix}gate_proj.bias"].float()
                both[1::2] = stored[f"{prefix}up_proj.bias"].float()
                experts.down_proj_bias[expert] = stored[f"{prefix}down_proj.bias"].float()
    return model


class GptOssBench(Bench):
    """``Bench`` for this model, of a folder that may be MXFP4."""

    def load(self) -> Any:
        return original(self.source)


def make(out: Path, tokenizer_folder: Path, steps: int, rules: list[str], seed: int = 0) -> None:
    """Train, round and quantize into ``out``; what is there already is kept."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    if not (out / "bf16").exists():
        training, _ = standard_library()
        tokens = torch.tensor(list(token_stream(tokenizer, training)))
        model = train(tokens, configuration(tokenizer), steps, seed)
        count = sum(parameter.numel() for parameter in model.parameters())
        print(f"{count / 1e6:.1f} M parameters, {steps * TOKENS_A_STEP:,} tokens")
        model.bfloat16().save_pretrained(out / "bf16")
        tokenizer.save_pretrained(out / "bf16")
    if not (out / "mxfp4").exists():
        write_mxfp4(out / "bf16", out / "mxfp4")
    for source in ("bf16", "mxfp4"):
        for rule in rules:
            if not (out / f"{source}-{rule}").exists():
                with Checkpoint(out / source) as checkpoint:
                    options = plan(checkpoint, Options(scales=rule))
                    execute(checkpoint, options, out / f"{source}-{rule}")


def line(label: str, own: Figures | None, bf16: Figures) -> str:
    """A line of the table."""
    cells = [
        "\N{EN DASH}" if each is None else f"{each.kl:.5f} ± {each.error:.5f}"
        for each in (own, bf16)
    ]
    return f"| {label} | {cells[0]} | {cells[1]} | {bf16.perplexity:.4f} | {bf16.top1:.1%} |"


def main() -> None:
    """Parse the arguments, make what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a checkpoint with one")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rules", nargs="*", default=["max", "mse"], choices=[*RULES])
    parser.add_argument("--rows", type=int, default=48)
    args = parser.parse_args()
    make(args.out, args.tokenizer, args.steps, args.rules)
    bf16 = GptOssBench(args.out / "bf16", args.rows)
    mxfp4 = GptOssBench(args.out / "mxfp4", args.rows)
    print("| | KL to what it was made of | KL to bf16 | perplexity | top-1 as bf16 |")
    print("| --- | --- | --- | --- | --- |")
    print(line("bf16", None, bf16.figures(bf16.model)))
    made = bf16.figures(mxfp4.model)
    print(line("MXFP4", made, made))
    for rule in args.rules:
        model = from_nvfp4(args.out / f"bf16-{rule}", args.out / "bf16")
        figures = bf16.figures(model)
        print(line(f"NVFP4 from bf16, `{rule}`", figures, figures))
    for rule in args.rules:
        model = from_nvfp4(args.out / f"mxfp4-{rule}", args.out / "mxfp4")
        print(line(f"NVFP4 from MXFP4, `{rule}`", mxfp4.figures(model), bf16.figures(model)))
    print(f"\n{len(bf16.rows)} rows of {bf16.length} tokens, float32 on cpu")


if __name__ == "__main__":
    main()
