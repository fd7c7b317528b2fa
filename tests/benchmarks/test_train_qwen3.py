"""The second architecture's training: what it reads, what it computes, what it leaves."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.train_qwen3 import Sizes, configuration, grouped_in_bf16, make, texts, tokenise
from quantize.checkpoint.reader import Checkpoint
from quantize.experts.identify import identify
from quantize.run.plan import plan
from tests.benchmarks import tiny

SIZES = Sizes(hidden=64, layers=1, experts=4, chosen=2, intermediate=64, batch=2, length=32)


def test_the_standard_library_is_held_out_wherever_it_lies(tmp_path: Path) -> None:
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for number, file in enumerate(library[:20]):
        shutil.copyfile(file, tmp_path / f"vendored_{number}.py")
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("print('the same')\n")
    (tmp_path / "three.py").write_text("print('another')\n")
    found = list(texts(1, seed=0, folder=tmp_path))
    assert sorted(found) == ["print('another')\n", "print('the same')\n"]
    assert list(texts(1, seed=0, folder=tmp_path)) == found


def test_tokens_are_each_text_between_its_ends() -> None:
    tokenizer = tiny.tokenizer()
    tokens = tokenise(tokenizer, iter(["a = 1\n", "b"]))
    pieces = [[1, *tokenizer(text)["input_ids"], 2] for text in ("a = 1\n", "b")]
    assert tokens.tolist() == pieces[0] + pieces[1]


def test_default_sizes_suit_gpu_kernels() -> None:
    config = configuration(Sizes(), tiny.tokenizer())
    sizes = config.hidden_size, config.moe_intermediate_size, config.head_dim
    assert all(size % 64 == 0 for size in sizes)


def test_grouped_experts_in_bf16_are_the_class_own_within_bf16() -> None:
    model = tiny.model("qwen3")
    module = model.model.layers[0].mlp.experts
    hidden = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    weights, chosen = torch.rand(48, 4, generator=torch.Generator().manual_seed(1)).topk(2)
    model.set_experts_implementation("eager")
    expected = module(hidden, chosen, weights)
    found = grouped_in_bf16(module, hidden, chosen, weights)
    assert (found - expected).norm() < 0.02 * expected.norm()
    found.square().sum().backward()
    gradient = module.gate_up_proj.grad
    assert gradient.dtype == torch.float32 and gradient.abs().sum() > 0


@pytest.mark.parametrize("seed", [0])
def test_a_checkpoint_with_tokenizer_and_the_same_twice(tmp_path: Path, seed: int) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    figures = [
        make(
            tmp_path / name, tmp_path / "tokenizer", SIZES, steps=6, megabytes=0.05, rows=2,
            seed=seed,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    assert figures[0] == figures[1] < 1.5 * tiny.VOCABULARY
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16}
    assert identify(tmp_path / "one").default.form == "silu"
    with Checkpoint(tmp_path / "one") as source:
        assert plan(source).groups[0].num_experts == 4
    assert (tmp_path / "one" / "tokenizer.json").exists()
