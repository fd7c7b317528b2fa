"""The small trained model is one: with random numbers much that tests find would go unnoticed."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from examples.perplexity import held_out_rows, model_perplexity
from tests import trained as models


def test_it_has_learnt_and_its_gate_and_experts_matter(trained: Path) -> None:
    """Perplexity, of 2048 tokens: 59 here, 61 with plain SiLU, 70 without the routed experts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts

    rows = held_out_rows(AutoTokenizer.from_pretrained(trained), 6)
    model: Any = AutoModelForCausalLM.from_pretrained(
        trained, dtype=torch.float32, experts_implementation="eager"
    )
    right = model_perplexity(model, rows)
    assert right < 120
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MiniMaxM3VLExperts, "_apply_gate", plain_silu)
        assert model_perplexity(model, rows) > 1.015 * right
    for number in models.Sizes.of(trained).sparse:
        model.model.layers[number].mlp.experts.down_proj.data.zero_()
    assert model_perplexity(model, rows) > 1.08 * right


def plain_silu(_: Any, gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def make_slowly(cache: Path) -> None:
    """In a process of its own: :func:`models.own_model`, whose training only says that it began."""

    def train(command: list[str], **_: Any) -> Any:
        out = Path(command[-1])
        with (cache / "begun").open("a") as begun:
            begun.write("x")
        time.sleep(0.5)
        out.mkdir()
        return type("Done", (), {"returncode": 0})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "CACHE", cache)
        patch.setattr(models.subprocess, "run", train)
        assert models.own_model().is_dir()


def test_of_several_processes_one_trains(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=make_slowly, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "begun").read_text() == "x"
