"""Whole engines against Transformers running the same weights, dequantized by a plain reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.perplexity import held_out_rows, model_perplexity
from quantize.checkpoint.reader import Checkpoint
from quantize.evaluate import evaluate
from quantize.evaluate.predictions import Figures
from tests.conftest import ROOT
from tests.engine.score import prompts
from tests.plugin.reference import experts_of
from tests.trained import NANO, OWN, Sizes, nano

pytestmark = pytest.mark.engine


EXACT: dict[str, Any] = {"dtype": "float32", "enforce_eager": True}
"""What is left of a difference is then not rounding. The server tests run the defaults."""
INSIDE = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""The engine is in the process that asks it, and so is the worker of one rank: another process for
each would import vLLM twice more, which takes longer than all else. The server tests have vLLM's
own processes."""
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|0"}


def run_engine(folder: Path, *more: str, **env: str) -> subprocess.CompletedProcess[str]:
    """``benchmarks.engine`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.engine", str(folder), "--quantization", "nvfp4_moe",
         "--engine", json.dumps(EXACT), *more],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
        env=os.environ | INSIDE | env,
    )  # fmt: skip


def scores(folder: Path, file: Path, **more: Any) -> torch.Tensor:
    """What ``tests.engine.score`` says, in a process of its own: log-probabilities, flat.

    Args:
        file: for its result.
        more: arguments of the engine.
    """
    ranks = TWO_RANKS if "tensor_parallel_size" in more else {}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.score", str(folder), str(file),
         json.dumps(EXACT | more)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
        env=os.environ | INSIDE | ranks,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.tensor(json.loads(file.read_text()))


CASES = [(OWN, "modelopt"), (OWN, "compressed-tensors")]
if nano():  # whose experts matter more; one layout, since an engine takes long to start
    CASES.append((NANO, "modelopt"))


@pytest.mark.parametrize(("each_trained", "layout"), CASES, indirect=["each_trained"])
def test_agrees_with_transformers_on_the_dequantized_weights(
    each_trained: Path, quantized_of: Callable[[Path], dict[str, Path]], layout: str, tmp_path: Path
) -> None:
    """Mean KL over 512 positions and perplexity over 6 rows; and the perplexity is bf16's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file, folder = tmp_path / "distributions.npy", quantized_of(each_trained)[layout]
    sizes = Sizes.of(each_trained)
    done = run_engine(folder, "--rows", "6", "--distributions", str(file))
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.split("RESULT ")[1].splitlines()[0])

    tokenizer = AutoTokenizer.from_pretrained(each_trained)
    rows = held_out_rows(tokenizer, 6)
    model = AutoModelForCausalLM.from_pretrained(each_trained, dtype="float32")
    original = model_perplexity(model, rows)
    for index in sizes.sparse:
        experts = model.model.layers[index].mlp.experts
        prefix = f"model.layers.{index}.mlp.experts"
        for e, (gate, up, down) in enumerate(experts_of(folder, prefix, layout, sizes.experts)):
            experts.gate_up_proj.data[e] = torch.cat((gate, up))
            experts.down_proj.data[e] = down
    assert abs(result["perplexity"] / model_perplexity(model, rows) - 1) < 1e-4
    assert abs(result["perplexity"] / original - 1) < 0.01

    with torch.inference_mode():
        few = held_out_rows(tokenizer, 2, 257)
        logits = torch.cat([model(torch.tensor([row])).logits[0, :-1] for row in few])
    theirs = torch.log_softmax(logits.double(), -1)
    ours = torch.from_numpy(np.load(file)).double()
    assert ours.shape == theirs.shape == (512, sizes.vocabulary)
    kl = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert abs(kl) < 1e-5  # rounding of the normalisation may leave it just below zero

    # What `evaluate` says of the folder is what the engine does: its CPU kernel rounds no inputs.
    found = evaluated(each_trained, folder, rows)
    assert abs(found.before / original - 1) < 1e-5
    assert abs(found.after / result["perplexity"] - 1) < 1e-4
    unquantized = AutoModelForCausalLM.from_pretrained(each_trained, dtype="float32")
    with torch.inference_mode():
        logits = torch.cat([unquantized(torch.tensor([row])).logits[0, :-1] for row in few])
    before = torch.log_softmax(logits.double(), -1)
    kl = (before.exp() * (before - ours)).sum(-1).mean()
    assert kl > 1e-4
    assert abs(evaluated(each_trained, folder, few).kl - kl) < 1e-2 * kl + 2e-6


def evaluated(source: Path, target: Path, rows: list[list[int]]) -> Figures:
    """What ``nvfp4-moe evaluate --activations bf16`` finds on these rows."""
    with Checkpoint(source) as first, Checkpoint(target) as second:
        return evaluate(first, second, torch.tensor(rows), activations="bf16").figures


def test_tensor_parallelism_that_would_give_garbage_is_refused(quantized: dict[str, Path]) -> None:
    """vLLM's Transformers backend adds MiniMax-M3's shared expert once per rank, silently."""
    settings = json.dumps(EXACT | {"tensor_parallel_size": 2})
    done = run_engine(quantized["modelopt"], "--engine", settings, **TWO_RANKS)
    assert done.returncode != 0
    assert "add this model's shared expert once per rank" in done.stdout + done.stderr


def test_experts_are_sharded(tmp_path: Path) -> None:
    """A random Qwen3-MoE (no shared expert): one rank, two tensor-parallel, two expert-parallel."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from quantize.execute import execute
    from quantize.run.plan import plan

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=8,
        num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True,
        max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(tmp_path / "source")
    with Checkpoint(tmp_path / "source") as source:
        execute(source, plan(source), tmp_path / "nvfp4")

    found = [
        scores(tmp_path / "nvfp4", tmp_path / "scores.json", **more)
        for more in (
            {},
            {"tensor_parallel_size": 2},
            {"tensor_parallel_size": 2, "enable_expert_parallel": True},
        )
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-4)
    assert found[0].std() > 0.5  # not a constant that any weights would give
    figures = evaluated(tmp_path / "source", tmp_path / "nvfp4", prompts())
    assert abs(figures.after / float((-found[0].double().mean()).exp()) - 1) < 1e-4
    assert abs(figures.after / figures.before - 1) > 1e-3  # and it is not the source's


def test_experts_without_a_gate(tmp_path: Path) -> None:
    """A random Nemotron-H with all its kinds of layers, latent experts among them: vLLM's
    log-probabilities are those of Transformers' class with the dequantized weights. In bf16 vLLM
    has no kernels for these experts on a CPU."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    from tests.plugin.reference import dequantize
    from tests.quantize.checkpoints import convert

    torch.manual_seed(0)
    config = NemotronHConfig(
        vocab_size=256, hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
        layers_block_type=["linear_attention", "moe", "full_attention", "moe", "mlp"],
        intermediate_size=96, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=80, moe_latent_size=64, routed_scaling_factor=2.5,
        mamba_num_heads=4, mamba_head_dim=32, n_groups=2, ssm_state_size=16, chunk_size=16,
        max_position_embeddings=256,
    )  # fmt: skip
    model = NemotronHForCausalLM(config).bfloat16().eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "conv1d" not in name:
            parameter.data.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "nvfp4")
    ours = scores(tmp_path / "nvfp4", tmp_path / "scores.json", enable_prefix_caching=False)

    def theirs() -> torch.Tensor:
        found = []
        with torch.inference_mode():
            for row in map(torch.tensor, prompts()):
                logits = model(row.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
                found.append(logits.gather(1, row[1:, None]).flatten())
        return torch.cat(found)

    model.float()
    original = theirs()
    tensors = load_file(tmp_path / "nvfp4" / "model.safetensors")
    for number in (1, 3):
        experts = model.model.layers[number].mixer.experts
        for expert in range(8):
            for name in ("up_proj", "down_proj"):
                stem = f"backbone.layers.{number}.mixer.experts.{expert}.{name}.weight"
                weight = dequantize(
                    tensors[stem], tensors[f"{stem}_scale"], tensors[f"{stem}_scale_2"]
                )
                getattr(experts, name).data[expert] = weight
    torch.testing.assert_close(ours, theirs(), rtol=1e-4, atol=1e-4)
    assert (ours - original).abs().max() > 0.05  # the experts matter


@pytest.mark.parametrize("ranks", [1, 2])
def test_gpt_oss(tmp_path: Path, ranks: int) -> None:
    """vLLM's own class, with attention sinks, sliding windows and experts that have biases."""
    from quantize.execute import execute
    from quantize.run.plan import plan
    from tests.engine.score import prompts
    from tests.plugin import biased

    biased.save(
        tmp_path / "bf16", layers=2, head_dim=64, vocab_size=256, max_position_embeddings=128
    )
    with Checkpoint(tmp_path / "bf16") as source:
        execute(source, plan(source), tmp_path / "nvfp4")
    more = {"tensor_parallel_size": 2} if ranks == 2 else {}
    ours = scores(tmp_path / "nvfp4", tmp_path / "scores.json", **more)
    theirs = biased.log_probabilities(tmp_path / "nvfp4", "modelopt", prompts()).flatten()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    assert theirs.std() > 0.5  # not a constant that any weights would give
